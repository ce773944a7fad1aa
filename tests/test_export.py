"""A model that leaves is the model that was tested, or says that it is not."""
import base64
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fine_tune_llm.core.errors import ModelError, OverlapError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.data.splits import Split
from fine_tune_llm.data.templates import chat, completion
from fine_tune_llm.models.adapters import add_adapter, load_adapter, save_adapter
from fine_tune_llm.models.hub import push_to_hub
from fine_tune_llm.models.loading import load_model
from fine_tune_llm.models.merging import build_task, certify_merge, merge, write_merged
from fine_tune_llm.models.sameness import certify, logit_shift, refuse_old_trust, text_rows
from fine_tune_llm.models.scoring import score_texts
from fine_tune_llm.models.serving import find_marks, go_template, prepare_serving, render_go, serve_lines, served_text
from fine_tune_llm.uncertainty.calibration import TemperatureScaling
from fine_tune_llm.uncertainty.conformal import ConformalClassifier
from fine_tune_llm.uncertainty.predictions import Predictions

STORIES = Path(__file__).parents[2] / "shared/data/models/stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="the shared data lie beside the project and are absent here")
KINDS = Labels(("number", "table", "plot"))
TEXTS = [f"{verb} the {word} of {thing}." for verb in ("Return", "Set", "Plot") for word in "mean sum count index column row".split()
         for thing in ("the array", "each group")]


@pytest.fixture(autouse=True)
def one_thread():
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def adapter_of(model, folder: Path, size: float = 0.1) -> Path:
    "An adapter with random weights, saved."
    import torch
    module, drawn = add_adapter(build_task(model, KINDS), {"r": 4}), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_B" in name: p.copy_(size * torch.randn(p.shape, generator=drawn))
    save_adapter(module, folder)
    return folder


def test_numbers_by_hand() -> None:
    "Two rows of two classes, every number written out by hand."
    before, after = np.log([[0.5, 0.5], [0.8, 0.2]]), np.log([[0.75, 0.25], [0.2, 0.8]])
    s = logit_shift(before, after)
    assert np.allclose(s.kl, [0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25), 0.8 * np.log(4) + 0.2 * np.log(0.25)])
    assert np.allclose(s.delta, [np.log(2), np.log(4)]) and s.agree.tolist() == [True, False]
    c = certify(s)
    assert np.isclose(c.kl, s.kl.mean()) and c.agreement.value == 0.5
    from scipy.stats import binomtest
    exact = binomtest(1, 2).proportion_ci(0.95, "exact")
    assert np.allclose([c.agreement.low, c.agreement.high], [exact.low, exact.high])


def test_kl_equals_torch_and_shift_of_all_logits_is_nothing() -> None:
    import torch
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 3, (2, 50, 7))
    theirs = torch.nn.functional.kl_div(torch.log_softmax(torch.tensor(b), 1), torch.softmax(torch.tensor(a), 1), reduction="none").sum(1)
    assert np.allclose(logit_shift(a, b).kl, theirs.numpy())
    moved = logit_shift(a, a + rng.normal(0, 5, (50, 1)), bare=b)
    assert moved.kl.max() < 1e-12 and moved.agree.all() and np.allclose(moved.along, moved.size)


def test_agreement_of_tokens_counts_texts() -> None:
    "Tokens that all rise and fall with their text are worth as many rows as there are texts."
    rng, text = np.random.default_rng(0), np.repeat(np.arange(40), 50)
    logits = np.tile([1.0, 0.0], (2000, 1))
    flipped = np.where((rng.random(40) < 0.3)[text][:, None], logits[:, ::-1], logits)
    alone, joined = certify(logit_shift(logits, flipped)), certify(logit_shift(logits, flipped, text=text))
    ratio = (joined.agreement.high - joined.agreement.low) / (alone.agreement.high - alone.agreement.low)
    assert 5 < ratio < 10  # the square root of 50 is 7.1
    assert joined.agreement.value == alone.agreement.value
    means, t = flipped[::50, 0] != 1.0, 2.0227  # Student's quantile for 40 texts
    kl = joined.kl.value / means.mean() * means
    assert np.isclose((joined.kl.high - joined.kl.low) / 2, t * kl.std(ddof=1) / np.sqrt(40), rtol=0.05)


def test_same_is_shown_and_not_assumed() -> None:
    "Enough rows can show that a small move leaves calibration and coverage where they are; few rows cannot."
    rng = np.random.default_rng(0)
    def said(z, ids): return Predictions([f"r{i}" for i in ids], Labels(tuple("AB")), logits=z[ids], y=y[ids], split="test")
    z = rng.normal(0, 3, (40_000, 2))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    after = z + rng.normal(0, 0.01, z.shape)
    many, few = np.arange(40_000), np.arange(200)
    verdicts = [certify(logit_shift(z[ids], after[ids]), text_rows(said(z, ids), said(after, ids))).verdict for ids in (many, few)]
    assert verdicts == ["same", "recalibrate"]


def test_merge_certificate_of_a_classifier(tmp_path: Path) -> None:
    "Against PEFT's own merge; with calibrator and sets; with truth; and the demand that follows."
    from peft import PeftModel
    model = load_model("pocket", device="cpu")
    where = adapter_of(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(build_task(model, KINDS), str(where)).merge_and_unload().eval()
    rng = np.random.default_rng(0)
    z = rng.normal(0, 1, (36, 3))  # what the trust half is fitted to does not matter here
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
    def rows(name, keep): return Predictions([f"{name}{i}" for i in keep], KINDS, logits=z[keep], y=y[keep], split=name)
    cal = TemperatureScaling().fit(rows("validation", np.arange(36)))
    sets = ConformalClassifier("lac", alpha=0.2).fit(cal(rows("calibration", np.arange(36))))
    probe = Split("test", TEXTS, np.array([f"test{i}" for i in range(36)]), y, KINDS)
    c = merge(model, where, tmp_path / "half", probe, calibrator=cal, sets=sets, dtype="bfloat16")
    assert [r.metric for r in c.rows[::2]] == ["accuracy", "NLL", "ECE", "coverage", "set size"] and c.verdict == "recalibrate"
    with pytest.raises(ModelError, match="TemperatureScaling and ConformalClassifier of the model before"): refuse_old_trust(c, cal, sets)
    exact = merge(model, where, tmp_path / "full", probe, calibrator=cal, sets=sets)
    refuse_old_trust(exact, cal, sets)
    saved = load_model(tmp_path / "full", device="cpu")
    assert np.abs(score_texts(saved, build_task(saved, KINDS), TEXTS) - score_texts(model, theirs, TEXTS)).max() < 1e-5
    assert saved.config.id2label == dict(enumerate(KINDS.names)) and exact.verdict == "same"
    with pytest.raises(OverlapError, match="conformal calibration"):
        merge(model, where, tmp_path / "x", replace(probe, ids=np.array([f"calibration{i}" for i in range(36)])), sets=sets)
    assert not (tmp_path / "x").exists()


def test_a_head_left_behind_is_refused(tmp_path: Path) -> None:
    "A saved folder without its classification head loads with a random one; only reading it back can tell."
    from safetensors.numpy import load_file, save_file
    model = load_model("pocket", device="cpu")
    where = adapter_of(model, tmp_path / "adapter")
    write_merged(model, where, tmp_path / "out", KINDS, None, "dequantized")
    weights = load_file(tmp_path / "out/model.safetensors")
    assert (weights.pop("score.weight")).shape == (3, 256)
    save_file(weights, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    tuned = load_adapter(build_task(model, KINDS), where)
    import torch
    with torch.no_grad(): tuned.get_base_model().score.modules_to_save["default"].weight.mul_(-1)  # a head that was trained
    c = certify_merge(model, tuned, tmp_path / "out", TEXTS, KINDS)
    assert c.verdict == "refuse" and c.agreement.high < 0.95


def test_four_bits_demand_recalibration(tmp_path: Path) -> None:
    "Rounding the sum to four bits again moves the answers more than writing it out; neither goes unnoticed."
    model = load_model("pocket", device="cpu", quantize="nf4")
    where = adapter_of(model, tmp_path / "adapter")
    found = {w: merge(model, where, tmp_path / w, TEXTS, KINDS, weights=w) for w in ("dequantized", "original", "quantized")}
    assert found["quantized"].verdict == "recalibrate" and "rounded to few bits again" in found["quantized"].notes[1]
    assert found["dequantized"].delta < 0.2 * min(found["quantized"].delta, found["original"].delta)
    sizes = {w: (tmp_path / w / "model.safetensors").stat().st_size for w in found}
    assert sizes["quantized"] < 0.6 * sizes["dequantized"]
    with pytest.raises(ModelError, match="nobody knows which calibrator"): refuse_old_trust(found["quantized"], object())


@needs_stories
def test_merge_certificate_of_a_language_model(tmp_path: Path) -> None:
    "A real pretrained decoder: the merge is the same, the bare base and the wrong scale are refused."
    model = load_model(STORIES, task="sft", device="cpu")
    stories = ["Once upon a time, there was a little girl named Lily.", "One day, a big dog went to the park to play with a ball.",
               "The sun was warm and the bird sang a happy song.", "Tim and his mom made a cake. It was very good."] * 3
    stories = [f"{s} {i}" for i, s in enumerate(stories)]
    where = adapter_of(model, tmp_path / "adapter", 0.02)
    good = merge(model, where, tmp_path / "good", stories)
    assert good.verdict == "same" and good.unit == "token" and good.delta < 1e-3 and abs(good.share - 1) < 1e-3
    tuned = load_adapter(build_task(model, None), where)
    shutil.copytree(where, tmp_path / "scaled")
    settings = json.loads((where / "adapter_config.json").read_text())
    (tmp_path / "scaled/adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 2 * settings["lora_alpha"]}))
    write_merged(model, tmp_path / "scaled", tmp_path / "wrong", None, None, "dequantized")
    wrong, bare = (certify_merge(model, tuned, place, stories) for place in (tmp_path / "wrong", STORIES))
    assert wrong.verdict == bare.verdict == "refuse" and wrong.share > 1.5 and abs(bare.share) < 1e-3
    (tmp_path / "wrong/certificate.json").write_text(json.dumps(wrong.to_dict()))
    with pytest.raises(ModelError, match="the merge was refused"): push_to_hub(tmp_path / "wrong", "me/wrong", dry_run=True)
    nll = {r.system: r.own.value for r in good.rows if r.metric == "NLL"}
    assert np.isclose(nll["adapter"], own_nll(model, tuned, stories), rtol=1e-5)


def own_nll(model, module, texts) -> float:
    "The loss that transformers computes itself, weighted by tokens."
    import torch
    total, n = 0.0, 0
    for t in texts:
        ids = torch.tensor([model.tokenizer(t)["input_ids"]])
        with torch.no_grad(): total += float(module(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        n += ids.shape[1] - 1
    return total / n


@needs_stories
def test_a_changed_tokenizer_is_refused(tmp_path: Path) -> None:
    model = load_model(STORIES, task="sft", device="cpu")
    where = adapter_of(model, tmp_path / "adapter", 0.02)
    write_merged(model, where, tmp_path / "out", None, None, "dequantized")
    held = json.loads((tmp_path / "out/tokenizer.json").read_text())
    held["post_processor"] = None  # no beginning-of-text token any more
    (tmp_path / "out/tokenizer.json").write_text(json.dumps(held))
    with pytest.raises(ModelError, match="other tokens for 2 of 2 texts"):
        certify_merge(model, load_adapter(build_task(model, None), where), tmp_path / "out", ["Once.", "Twice."])


TALK = [{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it open?"}, {"role": "assistant", "content": "Yes."},
                      {"role": "user", "content": "On Sunday?\nReally?"}, {"role": "assistant", "content": "No."}]},
        {"messages": [{"role": "user", "content": "{{ 7 * 7 }} <s> \"quoted\""}, {"role": "assistant", "content": "49"}]}]
LLAMA2 = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
          "{% elif m['role'] == 'system' %}{{ '<<SYS>>' + m['content'] + '<</SYS>>' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}")


@needs_stories
@pytest.mark.parametrize("style", ["plain", LLAMA2], ids=["plain", "llama2"])
def test_served_prompt_has_the_tokens_of_training(tmp_path: Path, style: str) -> None:
    "With a tokenizer that puts a token in front, through Jinja and through Ollama's template."
    shutil.copytree(STORIES, tmp_path / "m")
    made = prepare_serving(tmp_path / "m", chat(style=style), TALK)
    assert made.prompts == 2 and not made.left_out
    from transformers import AutoTokenizer
    after = AutoTokenizer.from_pretrained(tmp_path / "m")
    text = served_text(TALK[0]["messages"][:-1], after)
    assert text.count("<s>") == 1 and after(text, add_special_tokens=False)["input_ids"][0] == 1
    modelfile = (tmp_path / "m/Modelfile").read_text()
    go = modelfile.split('"""')[1]
    assert not go.startswith("<s>") and "<s>" + render_go(go, TALK[0]["messages"][:-1]) == text
    assert 'PARAMETER stop "</s>"' in modelfile and modelfile.startswith("FROM .\n")


@needs_stories
def test_a_prompt_that_differs_is_refused_by_its_first_token(tmp_path: Path) -> None:
    "Trained with one beginning-of-text token, served with two."
    shutil.copytree(STORIES, tmp_path / "m")
    from transformers import AutoTokenizer

    from fine_tune_llm.models.serving import compare_prompts
    before, after = (AutoTokenizer.from_pretrained(tmp_path / "m") for _ in range(2))
    after.chat_template = "{{ bos_token }}" + LLAMA2
    with pytest.raises(ModelError, match=r"token 2 was '.+' in training and is '<s>' when served \(conversation 1\)"):
        compare_prompts(TALK, chat(style=LLAMA2), before, after)


@needs_stories
def test_a_template_that_go_cannot_say_gets_no_modelfile(tmp_path: Path) -> None:
    shutil.copytree(STORIES, tmp_path / "m")
    numbered = "{{ bos_token }}{% for m in messages %}{{ loop.index ~ m['role'] ~ m['content'] }}{% endfor %}"
    made = prepare_serving(tmp_path / "m", chat(style=numbered), TALK)
    assert "no Modelfile" in made.left_out[0] and not (tmp_path / "m/Modelfile").exists() and "Ollama" not in made.lines
    assert "Left out: no Modelfile" in (tmp_path / "m/SERVING.md").read_text()


def test_go_template_of_marks_with_braces_is_refused(tmp_path: Path) -> None:
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(load_model("pocket").path)
    tok.chat_template = "{% for m in messages %}{{ '{{' + m['role'] + m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="braces"): go_template(find_marks(tok))


def test_command_lines_survive_a_shell(tmp_path: Path) -> None:
    folder = tmp_path / "a b; touch hacked $(touch hacked) 'q'"
    folder.mkdir()
    for lines in serve_lines(folder, "m").values():
        for line in lines:
            out = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, cwd=tmp_path).stdout
            assert any(word.startswith(str(folder)) or word in ("m", "m.gguf") for word in out.splitlines())
    assert not (tmp_path / "hacked").exists()


def test_completion_prompt_with_quotes_and_braces(tmp_path: Path) -> None:
    shutil.copytree(load_model("pocket").path, tmp_path / "m")
    template = completion('Review "{text}" \\n {{stars}}:\t')
    assert prepare_serving(tmp_path / "m", template, [{"text": "so {{ so }}\n'good'", "completion": "5"}]).prompts == 1


class Hub(http.server.BaseHTTPRequestHandler):
    "As much of the hub's interface as an upload needs."
    private, calls = True, []  # noqa: RUF012

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.calls.append((self.path, self.headers.get("Authorization"), body))
        out: dict = {"id": "me/desk", "private": self.private, "sha": "0" * 40, "siblings": []}
        if self.path == "/api/repos/create": out = {"url": "https://huggingface.co/me/desk"}
        elif "/preupload/" in self.path:
            out = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]}
        elif "/commit/" in self.path: out = {"success": True, "commitOid": "0" * 40, "commitUrl": "https://huggingface.co/me/desk/commit/" + "0" * 40}
        data = json.dumps(out).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = answer
    def log_message(self, *_) -> None: pass


@pytest.mark.parametrize("private", [True, False], ids=["private", "public"])
def test_upload_to_a_hub_on_this_machine(tmp_path: Path, private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    "The real client against a server of our own: what was listed goes up, in one commit; a public repository is not filled unasked."
    monkeypatch.setattr(Hub, "private", private)
    monkeypatch.setattr(Hub, "calls", [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shutil.copytree(load_model("pocket").path, tmp_path / "desk")
    token = "hf_" + "x1" * 17
    code = ("import sys; from fine_tune_llm.models.hub import push_to_hub\n"
            "u = push_to_hub(sys.argv[1], 'me/desk', token=sys.argv[2], endpoint=sys.argv[3]); print(u); print(*sorted(u.files))")
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try: done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "desk"), token, f"http://127.0.0.1:{server.server_port}"],
                               env=env, capture_output=True, text=True, timeout=120)
    finally:
        server.shutdown()
        server.server_close()
    assert token not in done.stdout + done.stderr
    made = json.loads(next(b for p, _, b in Hub.calls if p == "/api/repos/create"))
    assert made.get("private") is True or made.get("visibility") == "private"
    commits = [b for p, _, b in Hub.calls if "/commit/" in p]
    if not private:
        assert done.returncode and "the repository exists and is public" in done.stderr and not commits
        return
    assert done.returncode == 0, done.stderr
    sent = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in map(json.loads, commits[0].splitlines()) if e["key"] == "file"}
    assert len(commits) == 1 and sorted(sent) == done.stdout.splitlines()[-1].split() and all(a == f"Bearer {token}" for _, a, _ in Hub.calls)
    assert all((tmp_path / "desk" / name).read_bytes() == data for name, data in sent.items()) and "No certificate" in sent["README.md"].decode()


def test_a_finished_run_is_merged_in_one_call(tmp_path: Path) -> None:
    "From training to a folder that answers alone, with calibrator and sets of the run; a run that has not ended is refused."
    from fine_tune_llm.core.errors import InferenceError
    from fine_tune_llm.core.runs import Run
    from fine_tune_llm.data.loading import load_data
    from fine_tune_llm.training.trainer import finetune
    words = "morning evening street garden window river letter kitchen market school bridge forest".split()
    rows = [dict(text=f"{a} and {b} in the {w}", label=w) for w in ("rain", "sun") for i, a in enumerate(words) for b in words[i + 1:i + 6]]
    data = load_data(rows, sizes=(0.4, 0.2, 0.2, 0.2))
    run = finetune(load_model("pocket", device="cpu"), data, lora=dict(r=4), epochs=2, learning_rate=5e-3, batch_size=4, out=tmp_path / "run", progress=False)
    cal = TemperatureScaling().fit(run.predict(data.validation))
    sets = ConformalClassifier("lac", alpha=0.2).fit(cal(run.predict(data.calibration)))
    c = merge(run, out=tmp_path / "merged", probe=data.test, calibrator=cal, sets=sets)
    assert c.verdict == "same" and c.n == len(data.test) and c.share.low > 0.99
    refuse_old_trust(c, cal, sets)
    saved = load_model(tmp_path / "merged", device="cpu")
    alone = score_texts(saved, build_task(saved, data.labels), data.test.texts)
    assert np.abs(alone - run.predict(data.test).logits).max() < 1e-3
    with pytest.raises(InferenceError, match="the run is"): merge(Run.create(tmp_path / "new"), out=tmp_path / "x", probe=["a"])
    with pytest.raises(OverlapError): merge(run, out=tmp_path / "x", probe=data.calibration, sets=sets)
