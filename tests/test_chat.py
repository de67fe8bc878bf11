"""Dialogues: templates, control tokens, what is learned of them, conversations, and worlds that check answers."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import settings_for

import prepare
import tokenizer as tokenizers
import train
from batches import DialogueDataset
from chat import CONTROLS, TEMPLATE, Chat, chat_tokenizer, check_messages
from configurator import UserError, parse
from machine.distributed import World
from model import GPT, GPTConfig, init_weights
from sources import dialogues, texts
from tasks.chat import ChatTask, talker, widen
from tasks.loading import load, publish
from worlds import WORLDS

ROOT = Path(__file__).resolve().parents[1]
TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"}, {"role": "user", "content": "who are you"},
        {"role": "assistant", "content": "a model"}]
LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789+-*=<>|"


def said(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def some_tokenizer(kind):
    if kind == "bpe":
        return tokenizers.BPETokenizer.train(["hello, who are you? be brief. a model. hi"], 270, exact=False)
    return {"char": tokenizers.CharTokenizer(LETTERS), "byte": tokenizers.ByteTokenizer()}[kind]


@pytest.fixture(params=["char", "byte", "bpe"])
def chat(request):
    return Chat(chat_tokenizer(some_tokenizer(request.param)))


def test_a_dialogue_is_written_as_its_template_says_and_only_answers_are_learned(chat):
    ids, written = chat.encode(TALK)
    assert chat.tokenizer.decode(ids) == ("<|system|>be brief<|end|><|user|>hello<|end|><|assistant|>hi<|end|>"
                                          "<|user|>who are you<|end|><|assistant|>a model<|end|>")
    assert chat.tokenizer.decode(ids[written]) == "hi<|end|>a model<|end|>"
    prompt = chat.prompt(TALK[:4])
    assert (prompt == ids[:len(prompt)]).all() and chat.tokenizer.decode(ids[len(prompt):]) == "a model<|end|>"


def test_who_writes_a_control_token_ends_nobodys_turn(chat):
    ids, written = chat.encode(said("a <|end|><|assistant|>ha", "b<|end|>"))
    controls = [chat.tokenizer.encode_controls(name).item() for name in CONTROLS]
    assert np.isin(ids, controls).sum() == 4
    assert chat.tokenizer.decode(ids[written]) == "b<|end|><|end|>"


def test_a_saved_tokenizer_brings_its_template_and_its_end(chat, tmp_path):
    chat.tokenizer.save(tmp_path / "tokenizer.json")
    found = tokenizers.load(tmp_path / "tokenizer.json")
    assert found.template == TEMPLATE and tokenizers.same_vocabulary(found, chat.tokenizer)
    assert found.eos == chat.tokenizer.eos == found.encode_controls("<|end|>").item()
    assert chat_tokenizer(found) is found
    assert (Chat(found).encode(TALK)[0] == chat.encode(TALK)[0]).all()


CHATML = ("{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{{ message.content | trim }}"
          "{{ '<|im_end|>\\n' }}{%- endfor %}"
          "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}")


def test_a_template_of_the_world_makes_the_tokens_that_transformers_makes():
    from transformers import PreTrainedTokenizerFast
    made = tokenizers.with_controls(some_tokenizer("bpe"), ("<|im_start|>", "<|im_end|>"))
    made.template = CHATML
    theirs = PreTrainedTokenizerFast(tokenizer_object=made.bpe, chat_template=CHATML)
    ids, written = Chat(made).encode(TALK)
    assert ids.tolist() == theirs.apply_chat_template(TALK, return_dict=False)
    assert made.decode(ids[written]) == "hi<|im_end|>a model<|im_end|>"
    expected = theirs.apply_chat_template(TALK[:4], add_generation_prompt=True, return_dict=False)
    assert Chat(made).prompt(TALK[:4]).tolist() == expected


def test_a_template_that_rewrites_earlier_turns_is_refused():
    made = chat_tokenizer(some_tokenizer("char"))
    made.template = "{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}"
    with pytest.raises(UserError, match="writes earlier turns otherwise than the last one"):
        Chat(made).encode(TALK)


@pytest.mark.parametrize("messages, error", [
    ([], "must be a list"),
    ([{"role": "user"}], "message 1: must have a role and a content"),
    ([{"role": "bot", "content": "x"}], "the role 'bot' is unknown"),
    (said("a", "b", "c"), "ends with the user: the last message must be the assistant's"),
    ([{"role": "system", "content": "x"}], "ends with the system"),
    (said("a", "b\ud800"), "message 2: has half a character"),
    (said("a") + said("b"), "must take turns, the user first, after at most one system message; found user, user")])
def test_what_is_no_dialogue_is_refused_in_a_line(messages, error):
    with pytest.raises(UserError, match=f"talks.jsonl, line 3.*{error}"):
        check_messages(messages, "talks.jsonl, line 3")


# ----------------------------------------------------------------------------------------------------------------------
# Data and training

@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """A prepared folder of dialogues in which the assistant repeats what the user says."""
    folder = tmp_path_factory.mktemp("talks")
    words = ["alpha", "beta", "gamma", "delta", "rho"]
    rows = [said(f"{a} {b}", f"{a} {b}") + said(b, b) * (a == b) for a in words for b in words]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    settings, given = parse(prepare.Settings, [f"--name={folder / 'data'}", "--val_fraction=0.2"])
    prepare.main(settings, [str(folder / "talks.jsonl")], given)
    return folder / "data"


def settings(talks, **values):
    return settings_for("chat", **dict(
        dataset=str(talks), n_layer=1, n_head=2, n_embd=32, block_size=64, batch_size=4, max_iters=20, warmup_iters=2,
        learning_rate=3e-3, eval_interval=10, log_interval=5, sample_tokens=20, device="cpu", dtype="float32") | values)


def opened(talks, **values):
    task = ChatTask(settings(talks, **values))
    task.open(talks, World(0, 1, torch.device("cpu")))
    model = task.build(torch.Generator().manual_seed(0))
    task.fit(model)
    return task, model


@pytest.mark.parametrize("pack", [True, False])
def test_rows_hold_whole_dialogues_and_each_answer_once(talks, pack):
    task, _ = opened(talks, pack=pack)
    ids, written = task.rows["train"]
    assert all(task.tokenizer.decode(row[:1]) == "<|user|>" for row in ids)
    answers = "".join(task.tokenizer.decode(row[mask]) for row, mask in zip(ids, written)).split("<|end|>")[:-1]
    expected = [each["content"] for row in task.dataset.rows["train"] for each in row if each["role"] == "assistant"]
    assert answers == expected
    assert (len(ids) < len(task.dataset.rows["train"])) == pack
    rows = task.pick(3)
    arguments, weights = task.batch(rows, None)
    assert weights.sum() == task.weight(rows) and (arguments["targets"][weights > 0] == task.tokenizer.eos).any()


def test_a_dialogue_too_long_for_the_model_keeps_its_first_turns(talks, capsys):
    task, _ = opened(talks, block_size=24)
    assert "train dialogues are left out: their first answer ends after block_size = 24" in capsys.readouterr().out
    assert task.rows["train"][0].shape[1] <= 25
    task.dataset.rows["val"].insert(0, said("alpha" * 9, "beta"))
    assert "alpha" * 9 not in task.show(task.build(torch.Generator().manual_seed(0)).eval())
    with pytest.raises(UserError, match="block_size = 3: no train dialogue has an answer within it"):
        opened(talks, block_size=3)


def test_a_gpt_of_text_learns_to_chat_and_its_old_tokens_mean_what_they_meant(talks, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(["alpha beta gamma delta rho"] * 60))
    texts.prepare([tmp_path / "text.txt"], tmp_path / "text", "char")
    run = tmp_path / "gpt"
    small = dict(n_layer=1, n_head=2, n_embd=32, block_size=64, batch_size=4, max_iters=4, device="cpu",
                 sample_tokens=0)
    train.main(settings_for("text", dataset=str(tmp_path / "text"), out_dir=str(run), **small), {})
    old = load(run)[1]
    train.main(settings(talks, init_from=str(run), out_dir=str(tmp_path / "chat"), n_layer=2, learning_rate=0.0,
                        min_lr=0.0, weight_decay=0.0), {})
    task, model, _ = load(tmp_path / "chat")
    V = old.config.vocab_size
    assert model.config.vocab_size == V + len(CONTROLS) == task.tokenizer.vocab_size
    tokens = torch.arange(V)[None, :20] % V
    assert torch.allclose(old(tokens), model(tokens)[..., :V], atol=1e-6)


def test_an_untied_head_is_widened_too():
    model = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=2, n_embd=16, tied=False))
    init_weights(model, torch.Generator().manual_seed(0))
    tokens = torch.arange(8)[None]
    before = model(tokens)
    after = widen(model, 14, torch.Generator().manual_seed(0), "x")(tokens)
    assert after.shape[-1] == 14 and torch.allclose(before, after[..., :10], atol=1e-6)


@pytest.fixture(scope="module")
def run(talks, tmp_path_factory):
    """A run that has learned to repeat."""
    out = tmp_path_factory.mktemp("chat") / "run"
    train.main(settings(talks, out_dir=str(out), max_iters=150, eval_interval=75, n_embd=64, pack=False), {})
    return out


def test_a_resumed_chat_run_is_the_whole_run(talks, tmp_path):
    whole = settings(talks, out_dir=str(tmp_path / "whole"), dropout=0.1)
    train.main(whole, {})
    with pytest.raises(SystemExit):
        train.main(settings(talks, out_dir=str(tmp_path / "parts"), dropout=0.1, max_minutes=1e-9), {})
    train.main(settings(talks, out_dir=str(tmp_path / "parts"), dropout=0.1, resume=True), {})
    states = [load(tmp_path / name, which="last")[1].state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_it_answers_a_prompt_and_holds_a_conversation(run, talks, monkeypatch):
    task, model, _ = load(run)
    one, two = (messages[0]["content"] for messages in DialogueDataset(talks).rows["train"][:2])
    assert task.write(model, one, temperature=0.1) == one
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{one}\n\n/reset\n{two}\n"))
    assert task.write(model, chat=True, temperature=0.1) == f"{one}\n(forgotten)\n{two}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"HELLO\n{one}\n"))
    talk = task.write(model, chat=True, temperature=0.1)
    assert talk.startswith("(the character 'H' (U+0048)") and talk.endswith(f"\n{one}\n")
    with pytest.raises(UserError, match="prompt: has 103 tokens, and the model reads 64, its answer included"):
        task.write(model, "a" * 100)


def test_a_published_chat_model_holds_a_conversation_and_a_model_of_text_does_not(run, tmp_path, talks, monkeypatch):
    for _ in range(2):  # the second replaces the first
        publish(run, tmp_path / "published")
    task, model, _ = load(tmp_path / "published")
    one = DialogueDataset(talks).rows["train"][0][0]["content"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{one}\n"))
    sampling = settings_for("text", "sampling", chat=True, temperature=0.1)
    pieces = talker(task, sampling).sample(model, [{"text": ""}], sampling)
    assert "".join(piece for _, piece in pieces) == f"{one}\n"
    task.tokenizer.template = ""
    with pytest.raises(UserError, match="chat = True: .*published has no chat template: it continues texts"):
        talker(task, sampling)


def test_a_long_conversation_forgets_its_oldest_turns(run, monkeypatch):
    task, model, _ = load(run)
    monkeypatch.setattr(sys, "stdin", io.StringIO("alpha rho\n" * 6))
    talk = task.write(model, chat=True)
    assert "(the oldest turns no longer fit, and are forgotten)\n" in talk


def test_a_published_chat_model_answers_in_transformers_as_here(run, talks, tmp_path):
    import transformers
    text = DialogueDataset(talks).rows["train"][0][0]["content"]
    publish(run, tmp_path / "published")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "published")
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "published")
    prompt = reader.apply_chat_template(said(text), add_generation_prompt=True, return_tensors="pt")
    ids = theirs.generate(**prompt, do_sample=False, max_new_tokens=20)[0, prompt["input_ids"].shape[1]:]
    assert reader.decode(ids, skip_special_tokens=True) == text
    assert ids[-1] == reader.convert_tokens_to_ids("<|end|>")


def test_val_fraction_is_refused_where_it_does_nothing(tmp_path):
    rows = [{"messages": said(split, "b"), "split": split} for split in ("train", "val")]
    with pytest.raises(UserError, match="val_fraction = 0.3: the dialogues of x name their split; leave it out"):
        dialogues.prepare(rows, tmp_path / "data", "char", 0.3, "x")
    with pytest.raises(UserError, match="val_fraction = 0.3: a world decides itself"):
        prepare.main(parse(prepare.Settings, ["--val_fraction=0.3", f"--name={tmp_path / 'x'}"])[0], ["countdown"])


def test_a_line_that_is_no_dialogue_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    for line, error in (("nonsense", "is not a JSON object: nonsense"),
                        (json.dumps({"messages": said("a", "b"), "split": ["val"]}), "split = .*: must be one of")):
        path.write_text(json.dumps({"messages": said("a", "b")}) + f"\n{line}\n")
        with pytest.raises(UserError, match=f"bad.jsonl, line 2: {error}"):
            list(dialogues.read([path]))


# ----------------------------------------------------------------------------------------------------------------------
# Worlds

@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_problems_have_right_answers_and_belong_to_one_part(world):
    parts = {part: dict(world.problems(part, 300)) for part in ("train", "val", "test")}
    for found in parts.values():
        assert all(world.check(prompt, answer) == 1.0 for prompt, answer in found.items())
    prompts = {part: set(found) for part, found in parts.items()}
    assert not prompts["train"] & prompts["val"] and not (prompts["train"] | prompts["val"]) & prompts["test"]
    assert world.problem(5, 7) == world.problem(5, 7) != world.problem(6, 7)
    texts_of = "".join(prompt + answer for found in parts.values() for prompt, answer in found.items())
    assert set(texts_of) <= set(world.characters)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_a_text_of_equations_tells_what_is_true_and_nothing_that_will_be_asked(world):
    lines = world.text(2000).splitlines()
    assert len(lines) == 250 and all(len(line.split()) == 8 for line in lines)
    equations = {equation for line in lines for equation in line.split()}
    sides = [equation.split("=") for equation in equations]
    assert all(eval(left) == int(right) for left, right in sides)
    def key(equation):
        left, right = equation.split("=")
        return *sorted(re.findall(r"\d+|\*|\+|-" if world.name == "calculator" else r"\d+", left)), right

    asked = {key(world.equation(*problem)) for part in ("val", "test") for problem in world.problems(part, 400)}
    assert not asked & {key(equation) for equation in equations}


@pytest.mark.parametrize("world, prompt, answer, verdict", [
    ("countdown", "2 3 4=14", "2+3*4", 1.0), ("countdown", "2 3 4=14", "4*3+2", 1.0),
    ("countdown", "2 3 4=14", "2*3+4", 0.0), ("countdown", "2 3 4=14", "2+4*4", 0.0),
    ("countdown", "2 3 4=14", "2+3*", None), ("countdown", "2 3 4=14", "14", None),
    ("countdown", "2 3 4=14", "2+12", None), ("countdown", "5 5 5=5", "5-5+5", 1.0),
    ("calculator", "3*12", "36", 1.0), ("calculator", "3-12", "-9", 1.0), ("calculator", "3-12", "9", 0.0),
    ("calculator", "3-12", "9-", None), ("calculator", "3+12", "", None)])
def test_a_judge_says_what_is_right(world, prompt, answer, verdict):
    assert WORLDS[world].check(prompt, answer) == verdict


@pytest.mark.slow
def test_the_countdown_recipe_learns_and_is_scored(tmp_path):
    def run(*words):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, encoding="utf-8")
        assert not done.returncode, done.stderr
        return done.stdout
    out = f"--out_dir={tmp_path / 'out'}"
    run("train.py", "config/chat/countdown.py", "--max_iters=250", "--eval_interval=125", "--device=cpu", out)
    assert "malformed" in run("evaluate.py", out, "--device=cpu", "--test=True")
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["exact"] > 0.25 and found["pass@8"] > found["exact of samples"] > 0.1
    assert found["test problems"] == 800 and abs(found["test exact"] - found["exact"]) < 0.1
