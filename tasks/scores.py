"""What a reward model says of answers: its scores, and which of several answers it likes best."""

from pathlib import Path

import numpy as np
import torch

from batches import length_batches, padded, to_device
from configurator import UserError
from critic import RewardModel
from tasks.loading import load
from tasks.text import EVAL_TOKENS


def load_reward(folder, device):
    """(task, model) of a reward run, in eval mode. Raises UserError if the folder holds another model."""
    if not Path(folder).is_dir():
        raise UserError(f"reward = {folder}: there is no such folder: name the run of a --task=reward")
    task, model, _ = load(folder, device)
    if type(model) is not RewardModel:
        raise UserError(f"reward = {folder}: is of the class {type(model).__name__}, and scores nothing: name the run"
                        " of a --task=reward")
    return task, model


def answer_ids(chat, messages, answer):
    """The ids of messages with an answer, (T,): the last one is the answer's end token. chat: a Chat."""
    ids, written = chat.encode([*messages, {"role": "assistant", "content": answer}])
    return ids[:np.flatnonzero(written)[-1] + 1]


def scores(model, chat, dialogues, answers):
    """The scores (n,), float32, of n answers, each to the messages of a dialogue: see `scores_of`."""
    return scores_of(model, [answer_ids(chat, messages, answer) for messages, answer in zip(dialogues, answers)])


@torch.no_grad()
def scores_of(model, rows):
    """The scores (n,), float32, on the model's device, of n lists of ids, each read at its last one.

    Raises UserError for a list that is longer than the model reads.
    """
    lengths, training = np.array(list(map(len, rows))), model.training
    if lengths.max() > model.config.block_size:
        raise UserError(f"prompt and answer have {lengths.max()} tokens, and the reward model reads"
                        f" {model.config.block_size}: shorten them")
    device = next(model.parameters()).device
    found = torch.empty(len(rows), device=device)
    model.eval()
    for batch in length_batches(lengths, EVAL_TOKENS):
        ids, counts = padded([rows[i] for i in batch], 0)
        found[torch.from_numpy(batch).to(device)] = model(to_device(ids, device), to_device(counts - 1, device))
    model.train(training)
    return found


def best_of(folder, device, prompts, texts, verdicts):
    """The share of prompts whose text with the highest score is right. folder: a reward run.

    texts: a list for each prompt. verdicts: what the judge says of each. Of equal scores the first text counts. A text
    with control tokens has no score.
    """
    task, model = load_reward(folder, device)
    right = 0
    for prompt, some, judged in zip(prompts, texts, verdicts):
        plain = [i for i, text in enumerate(some) if task.chat.without_controls(text) == text]
        if plain:
            asked = [[{"role": "user", "content": prompt}]] * len(plain)
            found = scores(model, task.chat, asked, [some[i] for i in plain])
            right += judged[plain[found.argmax()]] == 1.0
    return right / len(prompts)
