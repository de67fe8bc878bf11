"""Makes a data set of dialogues: {train,val,test}.jsonl, tokenizer.json, chat_template.jinja, meta.json.

    python prepare.py talks.jsonl               {"messages": [{"role": "user", "content": ...}, ...]} in each line
    python prepare.py countdown                 problems of worlds.py with their answers; or calculator

The roles are user and assistant in turns, after at most one system message. A row may name its split. The others get
theirs by the hash of what the user says first, so that copies of a dialogue share a split; there is no test part then.

Rows stay texts. The task makes tokens of them with its model's tokenizer and template, so that a data set serves every
model.
"""

import hashlib
import json
from pathlib import Path

import tokenizer as tokenizers
from chat import chat_tokenizer, check_messages
from configurator import UserError
from run.files import to_json
from sources.labelled import PARTS
from sources.pairs import SPLITS, lines, split_of
from sources.texts import finish, writing
from worlds import SIZES, WORLDS

EXAMPLES = 4000  # of a world, to learn from
USUAL = 0.1  # the default of val_fraction


def are_dialogues(paths):
    """True if all paths are .jsonl files, and the first row of each has messages."""
    return all(path.suffix.lower() == ".jsonl" and path.is_file() and '"messages"' in first_line(path)
               for path in paths)


def first_line(path):
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.readline(10**6)


def read(paths):
    """Yields {"messages", perhaps "split"} for each line. Raises UserError, with file and line, for a bad one."""
    for path in paths:
        for number, line in enumerate(lines(path), 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = dict(json.loads(line))
            except (ValueError, TypeError):
                raise UserError(f"{where}: is not a JSON object: {line:.60}") from None
            messages = row.get("messages")
            check_messages(messages, where)
            part = {"split": PARTS[row["split"]]} if row.get("split") in PARTS else {}
            yield {"messages": [{name: each[name] for name in ("role", "content")} for each in messages], **part}


def of_world(name):
    """The rows of a world: its problems as the user's words, right answers as the assistant's, each with its split."""
    for split, count in {"train": EXAMPLES, **SIZES}.items():
        for prompt, answer in WORLDS[name].problems(split, count):
            yield {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
                   "split": split}


def prepare(rows, folder, tokenizer_name, val_fraction, source, world=""):
    """Writes the data set of an iterable of rows into the folder, and returns the dict of meta.json.

    world: the name of the world that checks the answers; "" if nobody does.
    """
    with writing(folder):
        splits, seen, copies, named = {split: [] for split in SPLITS}, set(), 0, 0
        for row in rows:
            key = json.dumps(row["messages"])
            copies += key in seen
            if key not in seen:
                named += "split" in row
                first = next(each["content"] for each in row["messages"] if each["role"] == "user")
                part = split_of(first, val_fraction)
                splits[row.get("split") or ("train" if part == "test" else part)].append(row["messages"])
            seen.add(key)
        if val_fraction != USUAL and named == len(seen):
            raise UserError(f"val_fraction = {val_fraction}: the dialogues of {source} name their split; leave it out")
        counts = {split: len(found) for split, found in splits.items()}
        for split in ("train", "val"):
            if not counts[split]:
                raise UserError(f"{source}: none of {len(seen):,} dialogues is for {split}: add dialogues, or give some"
                                f" a \"split\": \"{split}\"")
        print(f"dialogues: {', '.join(f'{count:,} {split}' for split, count in counts.items())}; left out: {copies:,}"
              " duplicates", flush=True)
        vocabulary = learn(tokenizer_name, splits)
        meta = {"kind": "chat", "source": source, "world": world, "sha256": "", "tokenizer": vocabulary.kind,
                "vocab_size": vocabulary.vocab_size, **{f"{split}_rows": count for split, count in counts.items()}}
        digest = hashlib.sha256()
        for split, found in splits.items():
            text = "".join(to_json({"messages": messages}) for messages in found).encode("utf-8")
            digest.update(text)
            Path(folder, f"{split}.jsonl.new").write_bytes(text)
        meta["sha256"] = digest.hexdigest()
        vocabulary.save(folder / "tokenizer.json.new")
        (folder / tokenizers.TEMPLATE).rename(folder / f"{tokenizers.TEMPLATE}.new")
        return finish(folder, (*(f"{split}.jsonl" for split in SPLITS), "tokenizer.json", tokenizers.TEMPLATE), meta)


def learn(name, splits):
    """The tokenizer `name`, learned from the contents of the training rows; characters: from all rows."""
    texts = {split: [each["content"] for messages in found for each in messages] for split, found in splits.items()}
    everything = [text for found in texts.values() for text in found]
    return chat_tokenizer(tokenizers.build(name, lambda: everything, lambda: texts["train"]))
