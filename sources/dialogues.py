"""Makes a data set of dialogues or preferences: {train,val,test}.jsonl, tokenizer.json, chat_template.jinja, meta.json.

    python prepare.py talks.jsonl               {"messages": [{"role": "user", "content": ...}, ...]} in each line
    python prepare.py countdown                 problems of worlds.py with their answers; or calculator
    python prepare.py pairs.jsonl               {"prompt": ..., "chosen": ..., "rejected": ...}: which answer is better

A preference is a prompt and two answers. Prompts and answers are texts or lists of messages. Where a row has no prompt,
chosen and rejected are whole dialogues that share all but the last answer.

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
    """True if all paths are .jsonl files, and the first row of each has messages, or chosen and rejected."""
    return all(path.suffix.lower() == ".jsonl" and path.is_file() and
               any(f'"{name}"' in first_line(path) for name in ("messages", "rejected")) for path in paths)


def first_line(path):
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.readline(10**6)


def read(paths):
    """Yields {"messages"} or {"messages", "chosen", "rejected"}, perhaps with "split", for each line.

    chosen, rejected: texts that answer the messages. Raises UserError, with file and line, for a bad line.
    """
    paired = None
    for path in paths:
        for number, line in enumerate(lines(path), 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = dict(json.loads(line))
            except (ValueError, TypeError):
                raise UserError(f"{where}: is not a JSON object: {line:.60}") from None
            is_pair = "chosen" in row and "rejected" in row
            if is_pair != (is_pair if paired is None else paired):
                kinds = ("a dialogue", "preferences")
                raise UserError(f"{where}: is {kinds[is_pair]}, and the first line is {kinds[paired]}: prepare the two"
                                " kinds apart")
            paired = is_pair
            found = preference(row, where) if is_pair else {"messages": dialogue(row.get("messages"), where)}
            split = row.get("split")
            if not (split is None or isinstance(split, str) and split in PARTS):
                raise UserError(f"{where}: split = {split!r}: must be one of {', '.join(PARTS)}")
            yield found | ({"split": PARTS[split]} if split else {})


def dialogue(messages, where, answered=True):
    """The messages with role and content alone. Raises UserError, which names `where`, if they are none."""
    check_messages(messages, where, answered)
    return [{name: each[name] for name in ("role", "content")} for each in messages]


def preference(row, where):
    """{"messages", "chosen", "rejected"} of a row with prompt (or none), chosen and rejected, texts or messages.

    Raises UserError, which names `where`, for a row from which nobody could learn.
    """
    prompt = row.get("prompt") or []
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if prompt and dialogue(prompt, f"{where}, prompt", answered=False)[-1]["role"] != "user":
        raise UserError(f"{where}, prompt: ends with the {prompt[-1]['role']}: its last message must be the user's")
    chosen, rejected = (whole(row[name], prompt, f"{where}, {name}") for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise UserError(f"{where}: chosen and rejected differ before the last answer: they must share all other"
                        " messages")
    if chosen == rejected:
        raise UserError(f"{where}: chosen and rejected are equal: leave the line out")
    return {"messages": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def whole(side, prompt, where):
    """The dialogue of one side of a preference: a text or messages that answer the prompt, or repeat it and answer."""
    if isinstance(side, str):
        if not prompt:
            raise UserError(f"{where}: is a text without a prompt: add \"prompt\", or make it a list of messages")
        side = [{"role": "assistant", "content": side}]
    if isinstance(side, list) and side[:len(prompt)] != prompt:
        side = prompt + side
    found = dialogue(side, where)
    if not found[-1]["content"].strip():
        raise UserError(f"{where}: the answer is empty: leave the line out")
    return found


def of_world(name):
    """The rows of a world: its problems as the user's words, right answers as the assistant's, each with its split."""
    for split, count in {"train": EXAMPLES, **SIZES}.items():
        for prompt, answer in WORLDS[name].problems(split, count):
            yield {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
                   "split": split}


def prepare(rows, folder, tokenizer_name, val_fraction, source, world=""):
    """Writes the data set of an iterable of rows, as `read` yields them, and returns the dict of meta.json.

    world: the name of the world that checks the answers; "" if nobody does.
    """
    with writing(folder):
        splits, seen, copies, named, kind = {split: [] for split in SPLITS}, set(), 0, 0, "chat"
        for row in rows:
            split = row.get("split")
            row = {name: value for name, value in row.items() if name != "split"}
            kind = "preferences" if "chosen" in row else "chat"
            key = json.dumps(row)
            copies += key in seen
            if key not in seen:
                named += bool(split)
                first = next(each["content"] for each in row["messages"] if each["role"] == "user")
                part = split_of(first, val_fraction)
                splits[split or ("train" if part == "test" else part)].append(row)
            seen.add(key)
        what = {"chat": "dialogues", "preferences": "preferences"}[kind]
        if val_fraction != USUAL and named == len(seen):
            raise UserError(f"val_fraction = {val_fraction}: the {what} of {source} name their split; leave it out")
        counts = {split: len(found) for split, found in splits.items()}
        for split in ("train", "val"):
            if not counts[split]:
                raise UserError(f"{source}: none of {len(seen):,} {what} is for {split}: add {what}, or give some a"
                                f" \"split\": \"{split}\"")
        print(f"{what}: {', '.join(f'{count:,} {split}' for split, count in counts.items())}; left out: {copies:,}"
              " duplicates", flush=True)
        vocabulary = learn(tokenizer_name, splits)
        meta = {"kind": kind, "source": source, "world": world, "sha256": "", "tokenizer": vocabulary.kind,
                "vocab_size": vocabulary.vocab_size, **{f"{split}_rows": count for split, count in counts.items()}}
        digest = hashlib.sha256()
        for split, found in splits.items():
            text = "".join(map(to_json, found)).encode("utf-8")
            digest.update(text)
            Path(folder, f"{split}.jsonl.new").write_bytes(text)
        meta["sha256"] = digest.hexdigest()
        vocabulary.save(folder / "tokenizer.json.new")
        (folder / tokenizers.TEMPLATE).rename(folder / f"{tokenizers.TEMPLATE}.new")
        return finish(folder, (*(f"{split}.jsonl" for split in SPLITS), "tokenizer.json", tokenizers.TEMPLATE), meta)


def learn(name, splits):
    """The tokenizer `name`, learned from the contents of the training rows; characters: from all rows."""
    texts = {split: [text for row in found for text in contents(row)] for split, found in splits.items()}
    everything = [text for found in texts.values() for text in found]
    return chat_tokenizer(tokenizers.build(name, lambda: everything, lambda: texts["train"]))


def contents(row):
    """All texts of a row, the two answers of a preference too."""
    answers = [row[name] for name in ("chosen", "rejected") if name in row]
    return [*(each["content"] for each in row["messages"]), *answers]
