r"""Dialogues as a model reads them: a template turns messages into text, and a tokenizer the text into tokens.

    chat = Chat(tokenizer)
    chat.prompt([{"role": "user", "content": "Hello"}])        the tokens that an answer continues
    chat.encode([..., {"role": "assistant", "content": "Hi"}])     all tokens, and which of them the assistant wrote

A template is written in Jinja, as the world publishes them. The one below makes

    <|user|>Hello<|end|><|assistant|>Hi<|end|>

in which each mark is one control token. A published chat model brings a tokenizer with a template of its own.
"""

import re

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from configurator import UserError
from tokenizer import BPETokenizer, ControlTokenizer, with_controls

ROLES = ("system", "user", "assistant")
CONTROLS = (*(f"<|{role}|>" for role in ROLES), "<|end|>")
TEMPLATE = ("{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
HELD = "\ue000{}\ue001"  # stands for a text that is put in later; characters of private use


def chat_tokenizer(tokenizer):
    """The tokenizer itself if it has a template; else one with our template and its control tokens."""
    if tokenizer.template:
        return tokenizer
    made = with_controls(tokenizer, CONTROLS)
    made.template = TEMPLATE
    return made


class Chat:
    """The dialogues of a tokenizer that has a template. Raises UserError if the template is broken."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        try:
            self.template = environment.from_string(tokenizer.template)
        except jinja2.TemplateError as error:
            raise UserError(f"the tokenizer's chat template is broken: {error}") from None
        controls = control_names(tokenizer)
        self.controls = re.compile("|".join(map(re.escape, controls))) if controls else None

    def render(self, messages, answering=False):
        """The text of messages. answering: ends where the assistant's answer begins."""
        try:
            return self.template.render(messages=messages, add_generation_prompt=answering, bos_token="", eos_token="")
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses the messages: {error}") from None

    def prompt(self, messages):
        """The ids (T,) of messages up to where the assistant's answer begins."""
        held = []
        return self.ids(self.render(self.disarmed(messages, held), answering=True), held)

    def encode(self, messages):
        """(ids (T,), written (T,)). written: True for what the assistant writes: each of its turns and its end token.

        Raises UserError if the template writes earlier turns otherwise than the last one.
        """
        held, done, ids, written = [], "", [], []
        messages = self.disarmed(messages, held)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, text = self.render(messages[:i], answering=True), self.render(messages[:i + 1])
            if not (prompt.startswith(done) and text.startswith(prompt)):
                raise UserError("the chat template writes earlier turns otherwise than the last one, so a dialogue of"
                                " several turns can't be learned with it")
            before = self.ids(prompt[len(done):], held, start=not done)
            answer = self.ids(text[len(prompt):], held, start=False)
            ends = np.flatnonzero(np.isin(answer, self.tokenizer.ends))
            length = ends[0] + 1 if len(ends) else len(answer)
            ids += [before, answer]
            written += [np.zeros(len(before), bool), np.arange(len(answer)) < length]
            done = text
        return np.concatenate(ids), np.concatenate(written)

    def disarmed(self, messages, held):
        """The messages with each control token in a content, such as <|end|>, put into the list `held`, and HELD there.

        Such a token in a text is ordinary text: nobody can end another's turn by writing it.
        """
        def hold(match):
            held.append(match[0])
            return HELD.format(len(held) - 1)

        if self.controls is None:
            return messages
        return [{**message, "content": self.controls.sub(hold, message["content"])} for message in messages]

    def without_controls(self, text):
        """The text without the control tokens in it, such as a model writes that has learned little."""
        return self.controls.sub("", text) if self.controls else text

    def ids(self, text, held, start=True):
        """The ids (T,) of a rendered text. start: begin with the ids that begin every text, unless they are there."""
        found = [self.tokenizer.encode(held[int(piece)]) if i % 2 else self.tokenizer.encode_controls(piece)
                 for i, piece in enumerate(re.split(HELD.format(r"(\d+)"), text)) if piece]
        ids, first = np.concatenate([np.zeros(0, np.int64), *found]), list(self.tokenizer.start)
        if start and first and list(ids[:len(first)]) != first:
            ids = np.concatenate((first, ids))
        return ids.astype(np.int64)


def refuse(reason):
    raise jinja2.TemplateError(reason)


def control_names(tokenizer):
    """The control tokens of a tokenizer, as texts, the longest first."""
    names = tokenizer.controls if isinstance(tokenizer, ControlTokenizer) else ()
    if isinstance(tokenizer, BPETokenizer):
        names = [token.content for token in tokenizer.bpe.get_added_tokens_decoder().values() if token.special]
    return sorted(names, key=len, reverse=True)


def check_messages(messages, where, answered=True):
    """Raises UserError unless messages are a dialogue: [system,] user, assistant, user, ..., each with a text.

    where: text that names them. answered: the last one must be the assistant's.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages must be a list of {{\"role\": ..., \"content\": ...}}, and not empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"{where}, message {i + 1}: must have a role and a content, both texts: {message!r:.80}")
        if re.search("[\ud800-\udfff]", message["content"]):
            raise UserError(f"{where}, message {i + 1}: has half a character, which no file can hold:"
                            f" {message['content']!r:.80}")
        if message.get("role") not in ROLES:
            raise UserError(f"{where}, message {i + 1}: the role {message.get('role')!r} is unknown: it must be one of"
                            f" {', '.join(ROLES)}")
    turns = [message["role"] for message in messages[messages[0]["role"] == "system":]]
    for i, role in enumerate(turns):
        if role != ROLES[1 + i % 2]:
            raise UserError(f"{where}: user and assistant must take turns, the user first, after at most one system"
                            f" message; found {', '.join(turns[:i + 1])}")
    if answered and (not turns or turns[-1] != "assistant"):
        raise UserError(f"{where}: ends with the {(turns or ['system'])[-1]}: the last message must be the assistant's"
                        " answer, which is learned")
