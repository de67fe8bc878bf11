import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import settings_for

import evaluate
import sample
import tasks.text
from configurator import UserError, flat_fields, from_command_line, parse
from tasks import TASKS
from tasks.loading import load
from tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Transcript


def run(out_dir, **settings):
    sample.main(settings_for("text", "sampling", **{"device": "cpu", "out_dir": str(out_dir), "max_new_tokens": 60,
                                                    **settings}))


def test_one_sample_is_streamed_and_equals_the_first_of_many(trained, capsys, monkeypatch):
    run(trained, prompt="the king", temperature=0.0)
    one = capsys.readouterr().out.removesuffix("\n")
    run(trained, prompt="the king", temperature=0.0, num_samples=3)
    many = capsys.readouterr().out.split("\n" + "-" * 80 + "\n")
    assert many == [one, one, one, ""] and one.startswith("the king") and len(one) == len("the king") + 60
    task, model, _ = load(trained)
    settings = settings_for("text", "sampling", max_new_tokens=60, temperature=0.0)
    pieces = list(task.sample(model, [{"text": "the king"}, {"text": "the"}, {"text": "the king"}], settings))
    for row in (0, 2):  # the prompts may differ, and the pieces of each sample come in order
        mine = [piece for index, piece in pieces if index == row]
        assert "".join(mine) == one and sum(map(bool, mine)) == 61
    assert len("".join(piece for index, piece in pieces if index == 1)) == len("the") + 60


def test_only_the_out_directory_is_needed(trained, tmp_path):
    """A checkpoint is copied elsewhere, without the data or the rest of the run, and sampled by the command."""
    shutil.copytree(Path(trained) / "best", tmp_path / "moved" / "best")
    script = Path(sample.__file__)
    done = subprocess.run([sys.executable, script, f"--out_dir={tmp_path / 'moved'}", "--prompt=-", "--num_samples=2",
                           "--max_new_tokens=20", "--device=cpu"], input="the\n", capture_output=True, text=True,
                          cwd=tmp_path, encoding="utf-8", check=True)
    assert done.stdout.startswith("the\n") and done.stdout.count("-" * 80) == 2


PYTHON = """
from tasks.loading import load

task, model, config = load("out")          # a run's or a checkpoint's folder, or a published model's, or its name
print(task.write(model, "the", max_new_tokens=20, temperature=0))
logits = model(torch.from_numpy(task.tokenizer.encode("the"))[None])  # (1, tokens, vocabulary)
"""


def test_a_trained_model_is_used_in_three_lines(trained, tmp_path, monkeypatch, capsys):
    """The lines are the README's, or PYTHON if it has none. The prompt is one whose characters this model knows."""
    shutil.copytree(trained, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    readme = (Path(sample.__file__).parent / "README.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n((?:import torch\n+)?from tasks.loading import load.*?)```", readme, re.DOTALL)
    names = {"torch": torch}
    exec(found[1].replace("ROMEO:", "the") if found else PYTHON, names)
    assert capsys.readouterr().out.startswith("the")
    task, model, logits = (names[name] for name in ("task", "model", "logits"))
    assert logits.shape == (1, 3, task.tokenizer.vocab_size) and names["config"]["step"] == 40
    assert repr(task) == f"<TextTask of {Path('out', 'best')}>" and repr(model.config).startswith("GPTConfig(n_layer=2")
    for name in ("out/best", "out/last", Path("out")):
        task, model, _ = load(name, which="last")
        run("out", prompt="the", temperature=0.0)
        assert task.write(model, "the", temperature=0, max_new_tokens=60) + "\n" == capsys.readouterr().out
    with pytest.raises(TypeError, match="temprature"):
        task.write(model, "the", temprature=0)


def test_a_prompt_that_is_not_utf8_is_refused_and_a_byte_order_mark_is_skipped(trained, tmp_path, capsys):
    with pytest.raises(UserError, match="prompt=the caf.: can't be read as UTF-8 text"):
        run(trained, prompt="the caf\udce9")  # how Python reads bytes on the command line that are not UTF-8
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="latin.txt: can't be read as UTF-8 text"):
        run(trained, prompt=f"FILE:{tmp_path / 'latin.txt'}")
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfthe\r\nking")  # as editors on Windows save it
    run(trained, prompt=f"FILE:{tmp_path / 'marked.txt'}")
    assert capsys.readouterr().out.startswith("the\nking")


@pytest.mark.parametrize("count", [1, 2])
def test_a_terminal_gets_no_control_characters(count, trained, capsys, monkeypatch):
    monkeypatch.setattr(tasks.text.TextTask, "sample", lambda *args: ((i, "\x1b[2Jthe\tking\n") for i in range(count)))
    run(trained, num_samples=count)
    assert "\x1b[2Jthe\tking\n" in capsys.readouterr().out  # a file or a pipe gets the text as it is
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    run(trained, num_samples=count)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\u241b[2Jthe\tking\n" in shown


def test_a_notice_is_printed_before_the_prompt(trained, capsys, monkeypatch):
    real = tasks.text.generate

    def generate(*args):
        print("NOTICE")
        yield from real(*args)

    monkeypatch.setattr(tasks.text, "generate", generate)
    run(trained, prompt="the king")
    assert capsys.readouterr().out.startswith("NOTICE\nthe king")


def test_prompts_come_from_files_and_stdin(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "p.txt").write_text("lord\n", encoding="utf-8")
    run(trained, prompt=f"FILE:{tmp_path / 'p.txt'}")
    from_file = capsys.readouterr().out
    run(trained, prompt="lord\n")
    assert capsys.readouterr().out == from_file and from_file.startswith("lord\n")
    with pytest.raises(UserError, match="--prompt=FILE:none.txt: can't be read as UTF-8 text"):
        run(trained, prompt="FILE:none.txt")
    run(trained)  # without a prompt the sample starts on a new line
    assert len(capsys.readouterr().out) == 61


def test_an_unknown_character_is_named(trained, capsys):
    with pytest.raises(UserError, match=r"prompt: the character 'É' \(U\+00C9\), in .the É., is not among"):
        run(trained, prompt="the É")
    assert not capsys.readouterr().out


def test_the_seed_decides(trained, capsys):
    outs = []
    for seed in (1, 1, 2):
        run(trained, seed=seed, num_samples=2)
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]


def test_each_sample_ends_before_the_stop_text(trained, capsys):
    run(trained, num_samples=4, max_new_tokens=200)
    whole = capsys.readouterr().out.split("\n" + "-" * 80 + "\n")[:-1]
    run(trained, num_samples=4, max_new_tokens=200, stop=" a")
    assert capsys.readouterr().out.split("\n" + "-" * 80 + "\n")[:-1] == [text.split(" a")[0] for text in whole]


def grow(tokenizer, ids, stop=""):
    """(the pieces shown, the final text) of a Transcript that gets these ids one by one."""
    text, pieces = Transcript(tokenizer, stop), []
    for i in ids:
        text.append(int(i))
        pieces.append(text.news())
    return pieces + [text.news(final=True)], str(text)


def test_streaming_never_shows_half_a_character_or_half_a_stop():
    said = "a 🙂 你好 z"
    for tokenizer in (ByteTokenizer(), BPETokenizer.train([said], 257)):
        pieces, text = grow(tokenizer, tokenizer.encode(said))
        assert "".join(pieces) == text == said and not any("\ufffd" in piece for piece in pieces)
        assert "🙂" in pieces
    pieces, text = grow(ByteTokenizer(), b"ab\xf0\x9f")  # the sample ends inside a character
    assert "".join(pieces) == text == "ab\ufffd"
    chars = CharTokenizer("abc")
    pieces, text = grow(chars, chars.encode("abaabcab"), stop="abc")
    assert text == "".join(pieces) == "aba" and pieces[:5] == ["", "", "ab", "a", ""]
    pieces, text = grow(chars, chars.encode("aab"), stop="abc")  # the stop never comes
    assert text == "".join(pieces) == "aab"


def test_an_end_of_text_token_ends_the_sample():
    bpe = BPETokenizer.train(["a b"], 257)
    _, text = grow(bpe, [*bpe.encode("a b"), bpe.eos, *bpe.encode("more")])
    assert text == "a b"


def test_sixteen_bit_weights_sample_too(trained, capsys):
    run(trained, dtype="bfloat16", prompt="the")
    assert len(capsys.readouterr().out) == 64


@pytest.mark.parametrize("setting, message", [
    (dict(temperature=-1.0), "temperature = -1.0: must be at least 0"),
    (dict(top_p=0.0), "top_p = 0.0: must be above 0 and at most 1"),
    (dict(num_samples=0), "num_samples = 0"),
    (dict(max_new_tokens=0), "max_new_tokens = 0"),
])
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        settings_for("text", "sampling", **setting)


def test_a_missing_run_and_an_unknown_model_are_named(tmp_path, monkeypatch, trained):
    (tmp_path / "run.lock").touch()
    with pytest.raises(UserError, match="there is no checkpoint in .*: train one first"):
        parse(sample.Settings, [f"--out_dir={tmp_path}", "--row=1"], **sample.HOW)
    with pytest.raises(UserError, match="there is no checkpoint in"):
        run(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, message in (("gpt2", "init_from = gpt2: no folder of that name, and it could not be downloaded"),
                          ("./no such", "init_from = ./no such: no folder of that name")):
        with pytest.raises(UserError, match=message):
            parse(sample.Settings, [f"--init_from={name}"], **sample.HOW)
            run("out", init_from=name)


@pytest.mark.parametrize("command", [sample, evaluate], ids=lambda command: command.__name__)
def test_help_lists_the_settings_of_each_task_before_there_is_a_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kind = {sample: "sampling", evaluate: "evaluating"}[command]
    for name, row in TASKS.items():
        monkeypatch.setattr(sys, "argv", [command.__name__, "--help", f"--task={name}"])
        with pytest.raises(SystemExit):
            from_command_line(command.Settings, command.__doc__, **command.HOW)
        shown = capsys.readouterr().out
        assert all(f"--{setting}=" in shown for setting in flat_fields(getattr(row, kind))), name
    with pytest.raises(UserError, match="task = 'columns': is for --help"):
        parse(command.Settings, ["--task=columns", "--out_dir=."], **command.HOW)


def test_the_model_decides_which_settings_there_are(trained):
    settings, _ = parse(sample.Settings, [f"--out_dir={trained}", "--top_k=3", "--checkpoint=last"], **sample.HOW)
    assert settings.top_k == 3
    for argument, message in (
            ("--image=a.png", "unknown setting --image on the command line; this model reads no images"),
            ("--draw=a.png", "unknown setting --draw on the command line; it is only for models of the task"
                             " image-text and masked-patches"),
            ("--out_dir=none", "there is no checkpoint in none: train one first, python train.py --out_dir=none"),
            ("--prompt=FILE:none.txt", "prompt = FILE:none.txt: there is no such file"),
            ("--prompt=FILE:/", "prompt = FILE:/: is a folder: name a file")):
        with pytest.raises(UserError) as error:
            parse(sample.Settings, [f"--out_dir={trained}", argument], **sample.HOW)
        assert str(error.value) == message
