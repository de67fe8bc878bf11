"""Makes a data set of questions on texts, whose answers are spans of the text: see labelled.py for its files.

    python prepare.py mine.jsonl            {"question", "context", "answers": {"text": [...], "answer_start": [...]}}
    python prepare.py train-v2.0.json       in each line, as SQuAD's rows are; or SQuAD as it is published
    python prepare.py facts                 a known set, made by data/facts/generate.py; or squad

answer_start counts characters, from 0. A question without an answer has empty lists, or no answers. A row may name its
split; else the hash of its title, or if there is none of its text, decides, so that a text has all its questions in one
part. Files whose names begin with train, dev (val, valid) or test are for that part.
"""

import hashlib
import json
import re

from configurator import UserError
from run.files import read_json
from sources.documents import read_jsonl
from sources.labelled import PARTS, check_text, own_parts

WORD = re.compile(r"\w+|[^\w\s]")  # of a text: answers begin and end at these
MOST_BYTES = 1_000_000  # of a file, by which it is known


def are_questions(paths):
    """True if all paths are SQuAD's .json, or .jsonl whose first row has a question and a context."""
    return all(path.is_file() and is_of_questions(path) for path in paths)


def is_of_questions(path):
    with open(path, "rb") as file:
        start = file.readline(MOST_BYTES) if path.suffix.lower() == ".jsonl" else file.read(MOST_BYTES)
    if path.suffix.lower() == ".json":
        return b'"data"' in start and b'"paragraphs"' in start
    return path.suffix.lower() == ".jsonl" and b'"question"' in start and b'"context"' in start


def read(paths):
    """Yields {"question", "context", "answers", perhaps "split" and "page"} for each question of some files.

    Raises UserError, with the row's place, for a row of which nothing can be learned.
    """
    parts = {path: PARTS.get(re.split(r"[\W_]", path.name.lower())[0]) for path in paths}
    is_told, count, unanswered = len({*parts.values()}) > 1, 0, 0
    for path in paths:
        given = {"split": parts[path]} if is_told and parts[path] else {}
        for where, row in published(path) if path.suffix.lower() == ".json" else read_jsonl(path):
            found = checked(row, where)
            count, unanswered = count + 1, unanswered + (not found["answers"]["text"])
            yield given | found
    print(f"questions: {count:,}, of which {unanswered:,} have no answer in their text", flush=True)
    if unanswered == count > 0:
        raise UserError(f"{', '.join(map(str, paths))}: no question has an answer, so there is none to learn to find:"
                        " add some")


def published(path):
    """Yields (where, row) of SQuAD's own JSON: articles of paragraphs, each a context with its questions."""
    try:
        for article in read_json(path)["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    found = {name: [answer[name] for answer in asked["answers"]] for name in ("text", "answer_start")}
                    yield f"{path}, question {asked.get('id', '')}", {
                        "question": asked["question"], "context": paragraph["context"], "answers": found,
                        "title": article.get("title")}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not in SQuAD's layout, data > paragraphs > qas ({error!r})") from None


def checked(row, where):
    """A row with what is needed alone. Raises UserError if the question or text is empty, or an answer not in place."""
    question, context, answers = row.get("question"), row.get("context"), row.get("answers") or {}
    if "answers" not in row and (other := next((name for name in row if name.startswith("answer")), None)):
        raise UserError(f"{where}: has no answers, but {other}: write it as answers, with the lists text and"
                        " answer_start, or without an answer as {}")
    for name, text in (("question", question), ("context", context)):
        check_text(text, where)
        if not re.search(r"\w", text):
            raise UserError(f"{where}: the {name} {text!r:.60} is empty: write one, or remove the row")
    texts, starts = (answers.get(name) for name in ("text", "answer_start")) if isinstance(answers, dict) else (0, 0)
    if answers == {}:
        texts, starts = [], []
    if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)):
        raise UserError(f"{where}: answers = {json.dumps(answers)!s:.60}: must have the lists text and answer_start, of"
                        " one length")
    for text, start in zip(texts, starts):
        check_text(text, where)
        if type(start) is not int or start < 0 or context[start:start + len(text)] != text or not WORD.search(text):
            place = f"; it stands at {context.find(text)}" if text.strip() and text in context else ""
            raise UserError(f"{where}: the answer {text!r:.60} is not in its context at answer_start = {start!r:.20}"
                            + place)
    page = row.get("title") or row.get("page") or hashlib.sha256(context.encode("utf-8")).hexdigest()[:16]
    return {"question": question, "context": context, "answers": {"text": texts, "answer_start": starts},
            **own_parts({**row, "page": page}, where)}
