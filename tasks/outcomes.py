"""What the columns task predicts, and how answers are scored: one of several classes, or a quantity.

Axes: B batch, n rows of a split, N classes of the model.
"""

import numpy as np
import torch.nn.functional as F

from tasks.labels import averages, decide, described, graded, indicators, label_report, write_rows


def outcome(config):
    """The Classes or the Quantity that a model of this ColumnsConfig predicts."""
    return Classes(config) if config.labels else Quantity(config)


class Classes:
    measure = "accuracy"  # it tells what a column is used for, when that is hidden

    def __init__(self, config):
        self.config = config

    def labels(self, rows):
        """(n, N + 1), bool: the class of each row of a data set, see `indicators`."""
        return indicators([[row["label"]] for row in rows], self.config.labels)

    def targets(self, labels):
        """(the model's targets, their weights) for some labels. A row of a class that the model lacks has weight 0."""
        return labels[:, :-1].argmax(1), (~labels[:, -1]).astype(np.float32)

    def graded(self, outputs, targets, weights):
        return graded(F.cross_entropy(outputs, targets, reduction="none"), outputs.argmax(-1).eq(targets), weights)

    def answers(self, outputs):
        """(B, N): the probability of each class."""
        return outputs.softmax(-1).numpy()

    def shown(self, answer, top, label=None):
        """An answer as text: the `top` likeliest classes; and the right label, if that is given and another one."""
        is_wrong = label not in (None, self.config.labels[answer.argmax()])
        return described(self.config.labels, answer, top) + f"  (right: {label})" * is_wrong

    def score(self, answers, labels):
        return averages(decide(answers), labels)

    def report(self, rows, answers, labels, floors, part, settings):
        """See `label_report`. floors: {method: the index of the class of each row (n,)}."""
        floors = {name: found[:, None] == np.arange(len(self.config.labels)) for name, found in floors.items()}
        return label_report(rows, answers, self.config.labels, labels, floors, part, settings)

    def methods(self):
        """{name: scikit-learn's estimator}, of the methods that stand beside the model."""
        from sklearn import dummy, ensemble, impute, linear_model, pipeline
        filled = impute.SimpleImputer(strategy="constant", fill_value=0)  # the mean of a number
        regression = linear_model.LogisticRegression(max_iter=1000)
        return {"most frequent": dummy.DummyClassifier(),
                "logistic regression": pipeline.make_pipeline(filled, regression),
                "gradient boosting": ensemble.HistGradientBoostingClassifier(random_state=0)}


class Quantity:
    measure = "rmse"

    def __init__(self, config):
        self.config = config

    def labels(self, rows):
        """(n, 1), float32: the standardised quantity of each row of a data set."""
        return np.array([[(row["label"] - self.config.mean) / self.config.std] for row in rows], dtype=np.float32)

    def targets(self, labels):
        return labels, np.ones_like(labels)

    def graded(self, outputs, targets, weights):
        """{"loss": (sum of squared errors, their number)}, for `averaged`."""
        return {"loss": (F.mse_loss(outputs, targets, reduction="sum").item(), len(targets))}

    def answers(self, outputs):
        """(B,), float64: the quantity in its own unit. outputs: (B, 1), or (B,), standardised."""
        return self.config.mean + self.config.std * np.asarray(outputs.flatten(), np.float64)

    def shown(self, answer, top=0, label=None):
        """A number as text, to a hundredth of its standard deviation's power of ten, such as 182,300."""
        digits = 2 - int(np.floor(np.log10(self.config.std)))
        right = "" if label is None else f"  (right: {self.shown(label)})"
        if abs(digits) > 9:
            return f"{float(answer):.4g}{right}"
        return f"{round(float(answer), digits):,.{max(digits, 0)}f}{right}"

    def score(self, answers, labels):
        """{"rmse" and "mae": in the quantity's unit, "r2": the share of the variance that the answers explain}."""
        truth = self.answers(labels)
        errors, spread = answers - truth, truth - truth.mean()
        return {"rmse": float(np.sqrt((errors**2).mean())), "mae": float(np.abs(errors).mean()),
                "r2": float(1 - (errors**2).sum() / max((spread**2).sum(), 1e-300))}

    def report(self, rows, answers, labels, floors, part, settings):
        """{name: value}: `score`, also that of each floor. floors: {method: its answers (n,), standardised}."""
        result = self.score(answers, labels)
        for name, found in floors.items():
            result |= {f"{key}, {name}": value for key, value in self.score(self.answers(found), labels).items()}
        write_rows(settings, "predictions", part, ({**row, "answer": float(answer), "truth": row["label"]}
                                                   for row, answer in zip(rows, answers)))
        return result

    def methods(self):
        from sklearn import dummy, ensemble, impute, linear_model, pipeline
        filled = impute.SimpleImputer(strategy="constant", fill_value=0)
        return {"mean": dummy.DummyRegressor(),
                "ridge regression": pipeline.make_pipeline(filled, linear_model.Ridge()),
                "gradient boosting": ensemble.HistGradientBoostingRegressor(random_state=0)}
