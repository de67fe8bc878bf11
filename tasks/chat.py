"""The chat task: a language model learns to answer. Supervised fine-tuning on dialogues, or learning them from scratch.

    python train.py config/chat/countdown.py
    python sample.py --out_dir=out/chat/countdown --prompt="3 12 17=53"
    python sample.py --out_dir=out/chat/countdown --chat
    python train.py --task=chat --dataset=talks --init_from=out/my_gpt

The loss counts what the assistant writes, each of its turns and its end token. A row begins at a dialogue. Further
dialogues follow while they fit, and see those before them; with --pack=False a row is one dialogue. A model from
--init_from gets embeddings for the template's control tokens, if it lacks them.

If the data set comes from a world (worlds.py), its problems of the split are answered too, and checked.

Axes: B batch, T tokens of a row but the last.
"""

import dataclasses
import functools
import sys

import numpy as np
import torch
from torch import nn

import tokenizer as tokenizers
from batches import DialogueDataset, fixed_rows, padded, shuffled_rows, to_device
from chat import Chat, chat_tokenizer, check_messages
from configurator import UserError, check_idle
from critic import Critic, as_kind
from generate import generate, pick_tokens, picker
from inside import record
from inside.picture import check_chosen, draw_text
from machine.terminal import watched
from model import GPT
from run.cost import flops_per_token, size_in_words
from tasks.labels import mean_nats
from tasks.scores import best_of
from tasks.settings import Chatting
from tasks.text import EVAL_TOKENS, TextTask
from worlds import SIZES, WORLDS

AT_ONCE = 512  # answers that are written at once
GREEDY = functools.partial(pick_tokens, temperature=0)


class ChatTask(TextTask):
    rows_label = "the rows"

    def __init__(self, settings, tokenizers=None, source=""):
        if tokenizers:
            tokenizers = {"tokenizer": chat_tokenizer(tokenizers["tokenizer"])}
        super().__init__(settings, tokenizers, source)

    def open(self, folder, world):
        self.dataset, self.world = DialogueDataset(folder), world
        self.open_tokenizer(folder)
        self.judge = WORLDS.get(self.dataset.meta["world"])
        self.judging = self.judge and not getattr(self.settings, "shard", False)  # a sharded model can't write
        if self.judging:
            self.best = ("exact", max)

    def adopt(self, model, generator):
        if type(model) is Critic:  # of PPO
            model = as_kind(GPT, model)
        return widen(super().adopt(model, generator), self.tokenizer.vocab_size, generator, self.source)

    def fit(self, model):
        self.block_size = model.config.block_size
        self.rows = {split: self.pack(split) for split in ("train", "val")}

    @functools.cached_property
    def chat(self):
        return Chat(self.tokenizer)

    # ------------------------------------------------------------------------------------------------------------------
    # Rows

    def pack(self, split):
        """(ids (n, T + 1) int32, written (n, T + 1) bool) of the split's rows, filled with id 0, not written."""
        rows, room, left_out, cut = [], 0, 0, 0
        for messages in self.dataset.rows[split]:
            found, turns = self.whole_turns(messages)
            if found is None:
                left_out += 1
                continue
            cut += turns < len(messages)
            if not self.settings.pack or len(found[0]) > room:
                rows.append([])
                room = self.block_size + 1
            rows[-1].append(found)
            room -= len(found[0])
        told = {"are left out: their first answer ends": left_out, "lose their last turns, which end": cut}
        for what, count in told.items():
            if count and self.world.is_main:
                print(f"{count:,} of {len(self.dataset.rows[split]):,} {split} dialogues {what} after block_size ="
                      f" {self.block_size} tokens")
        if not rows:
            raise UserError(f"block_size = {self.block_size}: no {split} dialogue has an answer within it; use a larger"
                            " one")
        ids, written = zip(*(map(np.concatenate, zip(*row)) for row in rows))  # the dialogues of each row, joined
        return padded(ids, 0)[0].astype(np.int32), padded(written, False)[0].astype(bool)

    def whole_turns(self, messages):
        """((ids, written), how many) of the first messages, as many turns as the model reads; (None, 0): no answer."""
        while messages:
            ids, written = self.chat.encode(messages)
            if len(ids) <= self.block_size + 1:
                return (ids, written), len(messages)
            messages = messages[:-2] if len(messages) > 3 else []
        return None, 0

    def pick(self, step):
        return shuffled_rows(len(self.rows["train"][0]), self.settings.batch_size, self.settings.seed, step)

    def weight(self, rows):
        return int(self.rows["train"][1][rows, 1:].sum())

    def batch(self, rows, generator):
        return self.arguments("train", rows)

    def arguments(self, split, rows):
        """({"tokens", "targets"}, weights), each (B, T). Weights are 1 for what the assistant writes, else 0."""
        ids, written = (array[rows] for array in self.rows[split])
        ids = to_device(ids.astype(np.int64), self.world.device)
        return {"tokens": ids[:, :-1], "targets": ids[:, 1:]}, to_device(written[:, 1:].astype(np.float32),
                                                                         self.world.device)

    # ------------------------------------------------------------------------------------------------------------------
    # Measures

    @torch.no_grad()
    def evaluate(self, model, split, world, dtype, limit=0):
        """{"loss": mean nats of what the assistant writes}; in a world also "exact": the share of right answers."""
        n, T = len(self.rows[split][0]), self.rows[split][0].shape[1] - 1
        batches = fixed_rows(n, max(1, EVAL_TOKENS // T), -(-limit // T))
        found = mean_nats(model, world, dtype, batches, functools.partial(self.arguments, split))
        if self.judging:
            found["exact"] = share(self.answer(model, self.problems(split), 1, GREEDY), 1.0)
        return found

    def details(self, model, split, world, dtype, settings, found):
        """{name: value}: answers that are malformed, and with samples at temperature 1 the shares of right ones.

        "exact of samples" is pass@1; "pass@8" is the share of problems that one of 8 samples solves, and "best of 8"
        the share of those whose sample with the highest score is right. With settings.test all of it for the part
        "test" too.
        """
        if not self.judge:
            check_idle(settings, "these dialogues have no answers that can be checked", "test", "reward")
            return {}
        result = {}
        for start, part in [("", split)] + [("test ", "test")] * settings.test:
            problems = self.problems(part)
            first = self.answer(model, problems, 1, GREEDY)
            drawn = functools.partial(pick_tokens, generator=torch.Generator(world.device).manual_seed(settings.seed))
            texts = self.texts(model, problems, settings.samples, drawn)
            verdicts = self.verdicts(problems, texts)
            result |= {f"{start}problems": len(problems), f"{start}exact": share(first, 1.0),
                       f"{start}malformed": share(first, None), f"{start}exact of samples": share(verdicts, 1.0),
                       f"{start}malformed samples": share(verdicts, None),
                       f"{start}pass@{settings.samples}": sum(1.0 in each for each in verdicts) / len(verdicts)}
            if settings.reward:
                best = best_of(settings.reward, world.device, problems, texts, verdicts)
                result |= {"reward": settings.reward, f"{start}best of {settings.samples}": best}
        return result

    def problems(self, split):
        """The prompts of the split, as the user writes them; of training, as many as validation has."""
        return [messages[0]["content"] for messages in self.dataset.rows[split]][:SIZES.get(split, SIZES["val"])]

    def answer(self, model, prompts, count, pick):
        """[[what the judge says of each of `count` answers] for each prompt]."""
        return self.verdicts(prompts, self.texts(model, prompts, count, pick))

    def verdicts(self, prompts, texts):
        return [[self.judge.check(prompt, text) for text in found] for prompt, found in zip(prompts, texts)]

    def texts(self, model, prompts, count, pick):
        """[[`count` answers] for each prompt]."""
        asked, texts = [self.chat.prompt([said("user", prompt)]) for prompt in prompts], [[] for _ in prompts]
        for rows in watched(alike(asked, count), "answering"):
            for i, ids in zip(rows, self.continuations(model, [asked[i] for i in rows], pick)):
                texts[i].append(self.text_of(ids))
        return texts

    def continuations(self, model, prompts, pick):
        """What the model writes after each of B prompts of one length: (B, at most `longest`) ids, as lists.

        A row ends at its end token, or where it is longer than any answer of the world: then it is malformed.
        """
        tokens = torch.from_numpy(np.stack(prompts)).to(next(model.parameters()).device)
        steps = generate(model, tokens, self.longest, pick, self.tokenizer.eos)
        return torch.stack(list(steps), dim=1).tolist()

    @property
    def longest(self):
        """The most tokens of an answer that is checked: one more than one of the world has, or its end token."""
        return self.judge.longest[1] + 1

    def until_end(self, ids):
        """An answer's ids up to its end token, which is included."""
        ends = self.tokenizer.ends
        return ids[:next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))]

    def text_of(self, ids):
        """The text of an answer before its end token."""
        return self.tokenizer.decode([token for token in self.until_end(ids) if token not in self.tokenizer.ends])

    # ------------------------------------------------------------------------------------------------------------------
    # Talking

    def sample(self, model, requests, sampling):
        """Yields (index of a request, next piece of its answer). A request with `messages` is a whole dialogue.

        With sampling.chat, there is one request. Its answers go on as long as there is something to read.
        """
        pick = picker(sampling, next(model.parameters()).device)
        if sampling.chat:
            yield from ((0, piece) for piece in self.converse(model, requests[0]["text"], pick, sampling))
            return
        check_chosen(model, sampling)
        for index, request in enumerate(requests):
            messages = self.asked_in(request, sampling)
            transcript = tokenizers.Transcript(self.tokenizer, sampling.stop)
            yield from ((index, piece) for piece in self.reply(model, messages, pick, sampling, transcript))
            if sampling.attention:
                yield index, "\n"
                yield index, draw_text(self, model, [*self.chat.prompt(messages), *transcript.ids], sampling)

    def inside(self, model, request, sampling):
        """The record of a dialogue and the answer to it. request: as for `sample`."""
        ids, room = self.prompt_and_room(model, self.asked_in(request, sampling))
        return record.of_text("chat", self, model, ids, sampling, room)

    def asked_in(self, request, sampling):
        """The messages of a request: its own, or its text after the system message."""
        messages = request.get("messages") or self.opening(sampling) + [said("user", request["text"])]
        check_messages(messages, "prompt", answered=False)
        return messages

    def opening(self, sampling):
        return [said("system", sampling.system)] if sampling.system else []

    def prompt_and_room(self, model, messages):
        """(ids (T,) of messages, the most tokens of an answer). Raises UserError if there is no room for one."""
        ids = self.chat.prompt(messages)
        room = model.config.block_size - len(ids)
        if room < 1:
            raise UserError(f"prompt: has {len(ids)} tokens, and the model reads {model.config.block_size}, its answer"
                            " included: shorten it")
        return ids, room

    def reply(self, model, messages, pick, sampling, transcript=None):
        """Yields the pieces of an answer to messages, and fills the transcript."""
        ids, room = self.prompt_and_room(model, messages)
        tokens = torch.from_numpy(ids)[None].to(next(model.parameters()).device)
        steps = generate(model, tokens, min(room, sampling.max_new_tokens), pick, self.tokenizer.eos)
        yield from (piece for _, piece in tokenizers.transcribe(
            steps, [transcript or tokenizers.Transcript(self.tokenizer, sampling.stop)]))

    def converse(self, model, text, pick, sampling):
        """Yields pieces of the answers to `text`, if it is not empty, and to each line of standard input.

        /reset forgets the dialogue. When it fills three quarters of the model's window, its oldest turns are forgotten.
        """
        messages = self.opening(sampling)
        while (text := text or read_line()) is not None:
            if text == "/reset":
                messages, text = self.opening(sampling), ""
                yield "(forgotten)\n"
                continue
            try:
                asked, forgotten = self.recent([*messages, said("user", text)], model.config.block_size)
                if forgotten:
                    yield "(the oldest turns no longer fit, and are forgotten)\n"
                pieces = []
                for piece in self.reply(model, asked, pick, sampling):
                    pieces.append(piece)
                    yield piece
                messages = [*asked, said("assistant", self.chat.without_controls("".join(pieces)))]
                yield "\n"
            except UserError as error:  # of what was typed: the conversation goes on without it
                yield f"({error})\n"
            text = ""

    def recent(self, messages, block_size):
        """(the messages without their oldest turns, as long as they fill three quarters of the window, whether any)."""
        start = messages[0]["role"] == "system"
        kept = list(messages)
        while len(kept) > start + 1 and len(self.chat.prompt(kept)) > block_size * 3 // 4:
            del kept[start:start + 2]
        return kept, len(kept) < len(messages)

    def show(self, model, short=False):
        """Problems of the world, or what a validation dialogue asks, with the model's answers."""
        if not self.judging:
            asked, s = self.first_question(), self.settings
            sampling = Chatting(max_new_tokens=min(100, s.sample_tokens) if short else s.sample_tokens)
            answer = said("assistant", "".join(self.reply(model, asked, GREEDY, sampling)))
            return "\n".join(f"{each['role']}: {each['content']}" for each in [*asked, answer])
        prompts = self.problems("val")[:3 if short else 10]
        texts = self.texts(model, prompts, 1, GREEDY)
        words = {1.0: "right", 0.0: "wrong", None: "malformed"}
        return "\n".join(f"{prompt}  {text}  ({words[self.judge.check(prompt, text)]})"
                         for prompt, (text,) in zip(prompts, texts))

    def first_question(self):
        """The messages up to the first answer of the first validation dialogue that the model can read."""
        messages = next(each for each in self.dataset.rows["val"] if self.whole_turns(each)[1])
        return messages[:next(i for i, each in enumerate(messages) if each["role"] == "assistant")]

    def command(self, out_dir):
        return super().command(out_dir, "--chat")

    def summary(self, model):
        ids, written = self.rows["train"]
        s, count = self.settings, len(self.dataset.rows["train"])
        return (f"model: {size_in_words(model)}; data: {count:,} dialogues of {s.dataset} in {len(ids):,} rows of"
                f" {ids.shape[1]} tokens, {written.mean():.0%} of them the assistant's;"
                f" {s.max_iters} updates = {s.max_iters * s.batch_size / len(ids):.1f} epochs")

    def cost(self, model):
        T = self.rows["train"][0].shape[1] - 1
        return self.settings.batch_size * T, self.settings.batch_size * T * flops_per_token(model, T)


def talker(task, sampling):
    """The task that samples: for a conversation with a published model, the ChatTask of its tokenizer.

    Raises UserError if that has no template. sampling: the settings of sample.py.
    """
    wanted = [f"{name} = {getattr(sampling, name)!r}" for name in ("chat", "system") if getattr(sampling, name, "")]
    if isinstance(task, ChatTask) or not wanted:
        return task
    if not task.tokenizer.template:
        raise UserError(f"{wanted[0]}: {task.source} has no chat template: it continues texts; teach it to answer with"
                        " --task=chat, see config/chat/dialogues.py")
    return ChatTask(task.settings, task.tokenizers, task.source)


def said(role, content):
    return {"role": role, "content": content}


def alike(prompts, count):
    """Lists of indices of prompts, each index `count` times: in a list, all prompts have one length."""
    by_length = {}
    for i, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).extend([i] * count)
    return [rows[i:i + AT_ONCE] for rows in by_length.values() for i in range(0, len(rows), AT_ONCE)]


def share(verdicts, verdict):
    """The share of all answers of which the judge says `verdict`. verdicts: a list for each problem."""
    found = [each for some in verdicts for each in some]
    return found.count(verdict) / len(found)


def read_line():
    """The next line that the user types, not empty, without spaces around it; None at the end."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip():
            return line.strip()


@torch.no_grad()
def widen(model, size, generator, source):
    """The model with a vocabulary of at least `size` tokens. New rows of embedding and head: the mean, and some noise.

    source: text that names the model in errors.
    """
    have = model.config.vocab_size
    if have >= size:
        return model
    if getattr(model.config, "bigrams", False) or not isinstance(getattr(model, "wte", None), nn.Embedding):
        raise UserError(f"init_from = {source}: has {have} tokens, and a chat needs {size}: no {type(model).__name__}"
                        f" {'with bigrams ' * hasattr(model, 'bigrams')}can be given more")
    for name in ("wte", "head"):
        layer = getattr(model, name, None)
        if layer is None:
            continue
        old = layer.weight.detach()
        noise = torch.empty(size - have, old.size(1)).normal_(0.0, 0.02, generator=generator).to(old)
        layer.weight = nn.Parameter(torch.cat((old, old.mean(0) + noise)))
    model.wte.num_embeddings = size
    if getattr(model, "head", None) is not None:
        model.head.out_features = size
    model.config = dataclasses.replace(model.config, vocab_size=size)
    return model
