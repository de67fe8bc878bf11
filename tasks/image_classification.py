"""The image classification task: a vision transformer names the class of a picture.

    python train.py config/fashion_mnist.py
    python sample.py --out_dir=out/fashion_mnist --image=shirt.png --attention=map.png
    python evaluate.py --out_dir=out/fashion_mnist --picture=confusion.png

It starts from random weights or, by --init_from, from the vision tower of a SigLIP or a PaliGemma. An image of another
shape than a square is stretched to one, in prepare.py and in sample.py.

Axes: B batch, n rows of a split, N labels of the model, S side of an image in pixels.
"""

import functools
import warnings

import numpy as np
import torch
import torch.nn.functional as F

from batches import ImageTextDataset, fixed_rows, read_images, scaled, shuffled_rows, to_device
from configurator import UserError, say
from inside import record
from inside.attention import rollout
from machine.device import autocast
from machine.terminal import watched
from run import pictures
from run.cost import flops_per_token, size_in_words
from run.pictures import save_picture
from tasks import TASKS
from tasks.image_text import SHOWN, check_patch, check_size, image_of
from tasks.labels import averaged, described, graded, indicators, installed, label_report, reports
from tasks.settings import Recognising
from tasks.task import Task
from vit import ImageClassifier, ImageClassifierConfig, ViT, ViTConfig, init_parts

SHAPE = ("n_layer", "n_head", "n_embd", "patch_size", "stem")  # the settings that shape the ViT
AT_ONCE = 256  # pictures per batch of an evaluation: it limits memory and changes no result
MOST_NUMBERS = 200_000_000  # in the pictures from which the floors learn: 800 MB


class PictureTask(Task):
    """Base class of tasks that train a ViT on pictures alone. The one model of a subclass has it as `vision`."""

    fixed_shapes = True
    rows_label = "the training pictures"
    tokenizer = None  # these models read no text

    def open(self, folder, world):
        """Also finds images[split], (n,): where in the data set the split's pictures are."""
        self.dataset, self.world = ImageTextDataset(folder, *TASKS[self.settings.task].kinds), world
        self.tokenizers = {}  # those of a SigLIP are not needed
        self.images = {split: np.array([row["image"] for row in rows]) for split, rows in self.dataset.rows.items()}

    @functools.cached_property
    def rows(self):
        """The training pictures to learn from, indices: all, unless `fit` chooses some."""
        return np.arange(len(self.images["train"]))

    def build(self, generator):
        s, size = self.settings, self.dataset.image_size
        check_patch("patch_size", s.patch_size, size)
        shape = {name: getattr(s, name) for name in SHAPE}
        return self.new(ViTConfig(**shape, cls=getattr(s, "pool", "mean") == "first", image_size=size), generator)

    def own(self):
        """{name: value} of the fields that the configuration of the task's model has beside the ViT and dropout."""
        return {}

    def new(self, vision, generator):
        """A new model. vision: a ViTConfig."""
        (cls, config_cls), = self.models.values()
        model = cls(config_cls(vision, dropout=self.settings.dropout, **self.own()))
        init_parts(model, generator)
        return model

    def adopt(self, model, generator):
        """The model of init_from, if it is one of this task with the same `own`; else its ViT under a new head."""
        (cls, _), = self.models.values()
        if type(model) is cls and all(getattr(model.config, name) == value for name, value in self.own().items()):
            return model
        if not isinstance(tower := getattr(model, "vision", None), ViT):
            raise UserError(f"init_from = {self.source}: is of the class {type(model).__name__}, and"
                            f" --task={self.settings.task} starts from a vision tower: name a run of"
                            " --task=image-classification, masked-patches, contrastive or image-text, or a PaliGemma;"
                            " or leave it out")
        say(f"{self.source}: its vision tower gets a new head, which starts from random weights")
        new = self.new(tower.config, generator).to(next(model.parameters()).device)
        new.vision.load_state_dict(tower.state_dict())
        return new

    def shape(self, model):
        return {name: getattr(model.config.vision, name) for name in SHAPE}

    def pick(self, step):
        s = self.settings
        return self.rows[shuffled_rows(len(self.rows), s.batch_size, s.seed, step)]

    def read(self, rows, generator):
        """Training pictures, changed as the settings say: (B, 3, S, S) in [-1, 1], on the device."""
        images = self.dataset.images[self.images["train"][rows]]
        return scaled(changed(images, self.settings.shift, self.settings.flip, generator), self.world.device)

    def command(self, out_dir):
        return super().command(out_dir, "--image=FILE")

    def summary(self, model):
        s, n = self.settings, len(self.rows)
        return (f"model: {size_in_words(model)}, {len(model.vision.wpe.weight)} tokens for a picture; data: {n:,}"
                f" pictures of {s.dataset}; {s.max_iters} updates = {s.batch_size * s.max_iters / n:.1f} epochs")

    def cost(self, model):
        """(tokens, FLOPs) of an update with all parameters trained; frozen ones are not deducted."""
        tokens = self.settings.batch_size * len(model.vision.wpe.weight)
        return tokens, tokens * flops_per_token(model.vision, len(model.vision.wpe.weight))


class ImageClassificationTask(PictureTask):
    best = ("accuracy", max)
    models = {"image_classifier": (ImageClassifier, ImageClassifierConfig)}

    def own(self):
        return {"labels": tuple(self.dataset.meta["labels"])}

    def shape(self, model):
        return {**super().shape(model), "pool": "first" if model.config.vision.cls else "mean"}

    def fit(self, model):
        """Also finds the labels of all rows: labels[split], see `indicators`."""
        check_size(model, self.dataset)
        if not set(model.config.labels) & set(self.dataset.meta["labels"]):
            raise UserError(f"the data set {self.dataset.folder} has none of the model's classes, such as"
                            f" {model.config.labels[0]}: name another --dataset")
        self.labels = {split: indicators([[row["label"]] for row in rows], model.config.labels)
                       for split, rows in self.dataset.rows.items()}
        if wanted := getattr(self.settings, "train_rows", 0):
            self.rows = self.drawn(wanted)

    def drawn(self, wanted):
        """The indices (wanted,) of training pictures, the same share of each class, drawn with the seed."""
        n, s = len(self.images["train"]), self.settings
        if wanted > n:
            raise UserError(f"train_rows = {wanted}: the data set {s.dataset} has only {n} training pictures")
        order = np.random.Generator(np.random.Philox(key=s.seed)).permutation(n)
        classes, places = self.labels["train"][order].argmax(1), np.empty(n)
        for each in np.unique(classes):  # spread evenly from 0 to 1, so that any beginning has the same share of them
            at = np.flatnonzero(classes == each)
            places[at] = (np.arange(len(at)) + 0.5) / len(at)
        return np.sort(order[places.argsort(kind="stable")[:wanted]])

    def batch(self, rows, generator):
        images = self.read(rows, generator)
        targets, weights = self.targets("train", rows)
        return {"images": images, "targets": targets}, weights

    def targets(self, split, rows):
        """(targets (B,), weights (B,)). A picture of a class that the model lacks has weight 0: it teaches nothing."""
        labels, device = self.labels[split][rows], self.world.device
        return to_device(labels[:, :-1].argmax(1), device), to_device((~labels[:, -1]).astype(np.float32), device)

    @torch.no_grad()
    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss": mean nats, "accuracy": share of right answers}. A class that the model lacks is an error."""
        def score(rows):
            targets, weights = self.targets(split, rows)
            images = read_images(self.dataset.images, self.images[split][rows], world.device)
            with autocast(world.device, dtype):
                logits = model(images)
            return graded(F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1).eq(targets), weights)

        most = max(1, limit // len(model.vision.wpe.weight)) if limit else 0
        return averaged(world, fixed_rows(len(self.images[split]), AT_ONCE, most), score)

    # ------------------------------------------------------------------------------------------------------------------
    # Measures

    details = reports  # of `report`, with settings.test for the part "test" too

    def report(self, model, part, dtype, settings):
        """{name: value}: see `label_report`."""
        rows, wanted = self.dataset.rows[part], self.labels[part]
        shares = np.concatenate([
            self.probabilities(model, read_images(self.dataset.images, self.images[part][at], self.world.device), dtype)
            for at in watched(fixed_rows(len(rows), AT_ONCE), "recognising")])
        return {"pictures": len(rows), **label_report(rows, shares, model.config.labels, wanted, self.floors(part),
                                                       part, settings)}

    def floors(self, part):
        """{name: decisions (n, N)} for the pictures of a part, learned from the pixels of the training pictures."""
        x, classes = self.training_pixels
        others, n_labels = self.pixels(self.images[part]), self.labels["train"].shape[1] - 1
        decided = {"most frequent": np.full(len(others), np.bincount(classes).argmax()),
                   "nearest mean": nearest(x, classes, others)}
        if installed("logistic regression", "scikit-learn"):
            decided["logistic regression"] = self.regression.predict(others)
        return {name: found[:, None] == np.arange(n_labels) for name, found in decided.items()}

    def pixels(self, images):
        """Pixels of the images with some indices (n,): float32 (n, P), 0 to 1. P: 3 * S * S; S * S if all are grey."""
        found = self.dataset.images[images]
        if self.is_grey:
            found = found[..., :1]
        return found.reshape(len(found), -1).astype(np.float32) / 255

    @functools.cached_property
    def is_grey(self):
        images = self.dataset.images
        return all((part[..., :1] == part).all() for part in np.array_split(images, -(-len(images) // AT_ONCE)))

    @functools.cached_property
    def training_pixels(self):
        """(pixels (n, P), classes (n,)) of the training pictures, or of some of them: at most MOST_NUMBERS."""
        rows = self.rows[~self.labels["train"][self.rows, -1]]
        rows = rows[::-(-len(rows) * self.dataset.images[0].size // MOST_NUMBERS)]
        return self.pixels(self.images["train"][rows]), self.labels["train"][rows, :-1].argmax(1)

    @functools.cached_property
    def regression(self):
        """scikit-learn's logistic regression on `training_pixels`."""
        from sklearn.linear_model import LogisticRegression
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that 100 steps did not reach the very optimum
            return LogisticRegression(C=0.1, max_iter=100).fit(*self.training_pixels)

    # ------------------------------------------------------------------------------------------------------------------
    # Answers

    @torch.inference_mode()
    def probabilities(self, model, images, dtype=torch.float32):
        """(B, N), float32: the probability of each label for each image. images: (B, 3, S, S), on the device."""
        with autocast(images.device, dtype):
            return model(images).softmax(-1).cpu().numpy()

    def sample(self, model, requests, sampling):
        """Yields (index of a request, its likeliest labels); if there are several, after the path of its image.

        sampling.attention, if set, names a picture to write: `rollout` as a heat map. Then (0, text) also says so.
        """
        device, size = next(model.parameters()).device, model.config.vision.image_size
        for index, request in enumerate(requests):
            found = image_of(request)
            image = pictures.pixels(found, size).to(device)[None]
            shares, = self.probabilities(model, image)
            path = f"{request['image']}: " * (len(requests) > 1)
            yield index, path + described(model.config.labels, shares, sampling.top)
        if sampling.attention:
            name = f"{model.config.labels[shares.argmax()]} {shares.max():.3f}"
            drawn = pictures.draw_attention(found, rollout(model, image)[None], "", [name])
            yield 0, "\n"
            yield 0, save_picture(drawn, sampling.attention)

    def inside(self, model, request, sampling):
        """The record of a picture: its patches as tokens, where they look, and the likeliest classes."""
        picture = image_of(request)
        vision, trunk = model.config.vision, model.vision.transformer
        image = pictures.pixels(picture, vision.image_size)[None].to(next(model.parameters()).device)
        N, side, first = vision.n_patches, vision.image_size // vision.patch_size, int(vision.cls)
        tokens = ["class"] * first + [f"{i // side + 1},{i % side + 1}" for i in range(N)]
        with record.notes_of(trunk, len(tokens), both_ways=True) as notes:
            model.vision(image)
        found, lens = record.answers(notes, lambda x: x[:1] if first else x.mean(0, keepdim=True), model.head, [0],
                                     "likeliest", model.config.labels.__getitem__)
        parts = {"attention": [record.packed("image", [own[..., first:] for own in notes.own], tokens,
                                             grid=[side, side])]}
        if notes.count < len(tokens):
            tokens, parts = tokens[:1], {"notes": [f"where its {N} patches look is not shown: they are too many"]}
        return record.make("classification", self, model, tokens, len(tokens), labels=[found[0]["top"][0][0]],
                           predictions=found, lens=lens, image=pictures.data_url(picture, SHOWN), **parts)

    def show(self, model, short=False):
        """Pictures of the validation part with their likeliest labels: ten, or if short three."""
        rows = self.dataset.rows["val"]
        places, = fixed_rows(len(rows), len(rows), 3 if short else 10)
        images = read_images(self.dataset.images, self.images["val"][places], self.world.device)
        shown = []
        for place, shares in zip(places, self.probabilities(model, images)):
            found, label = described(model.config.labels, shares, Recognising.top), rows[place]["label"]
            is_right = model.config.labels[shares.argmax()] == label
            shown.append(f"{rows[place]['file']}: {found}" + f"  (right: {label})" * (not is_right))
        return "\n".join(shown)

    def summary(self, model):
        seen = self.labels["train"][self.rows, :-1].any(0).sum()
        return f"{super().summary(model)}; {len(model.config.labels)} classes, pictures of {seen} of them"


def changed(images, shift, flip, generator):
    """A copy of images (B, S, S, 3), each moved by up to `shift` pixels, and half of them mirrored if flip."""
    B, S = images.shape[:2]
    if not shift and not flip:
        return images
    down, right = torch.randint(-shift, shift + 1, (2, B, 1), generator=generator).numpy()
    rows, columns = (np.clip(np.arange(S) - by, 0, S - 1) for by in (down, right))  # (B, S): where each comes from
    if flip:
        mirrored = torch.rand(B, 1, generator=generator).numpy() < 0.5
        columns = np.where(mirrored, columns[:, ::-1], columns)
    return images[np.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]]


# ----------------------------------------------------------------------------------------------------------------------
# Floors

def nearest(x, classes, others):
    """For each row of others (n, P), the class whose mean is nearest. x: (m, P), of the classes (m,)."""
    names = np.unique(classes)
    means = np.stack([x[classes == name].mean(0) for name in names])
    return names[((means ** 2).sum(1) - 2 * others @ means.T).argmin(1)]
