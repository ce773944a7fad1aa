"""Trainings in processes of their own, which a test may kill: a tiny model, a forked process per training, and what to wait for."""
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

from fine_tune_llm.core.errors import FineTuneLLMError
from fine_tune_llm.core.runs import Run

WORDS = "morning evening street garden window river letter kitchen market school bridge forest station harbour tower".split()
PRELOAD = ["trainings", "fine_tune_llm.training.trainer", "fine_tune_llm.training.control", "fine_tune_llm.data.loading", "transformers.trainer",
           "transformers.models.llama.modeling_llama", "transformers.models.llama.tokenization_llama", "transformers.data.data_collator", "peft", "bitsandbytes",
           "safetensors.torch", "sklearn.metrics", "scipy.stats"]


def tiny_llama(folder: Path, seed: int = 0) -> Path:
    "Two layers of width 64 with random weights, and a tokenizer of whole words."
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    vocab = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *WORDS, "and", "in", "the", "rain", "sun", "it", "is", ":"])}
    plain = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(vocab), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64)
    tokens.save_pretrained(folder)
    return folder


def weather(n: int = 10, words: list[str] = WORDS) -> list[dict[str, str]]:
    "Texts that one word tells apart."
    return [dict(text=f"{a} and {b} in the {w}", label=w) for i, a in enumerate(words[:n]) for b in words[:i] for w in ("rain", "sun")]


def train(base: str, out: str, options: dict[str, Any], resume: bool = False, rows: list[dict[str, str]] | None = None, load: dict[str, Any] | None = None,
          task: str = "classification", hook: str = "") -> None:
    "Train from the start, or go on; an error ends in a file beside the run folder."
    import torch

    from fine_tune_llm.data.loading import load_data
    from fine_tune_llm.models.loading import load_model
    from fine_tune_llm.training.trainer import finetune
    torch.set_num_threads(1)
    if hook: globals()[hook](Path(out))
    try:
        data = load_data(rows or weather(), sizes=(0.5, 0.2, 0.15, 0.15), near=None)
        model = load_model(base, task=task, device="cpu", **(load or {}))
        finetune(model, data, **options, **(dict(resume=out) if resume else dict(out=out)), progress=False)
    except FineTuneLLMError as e: Path(f"{out}.error").write_text(str(e))


def prefer(base: str, out: str, options: dict[str, Any], resume: bool = False, rows: list[dict[str, str]] | None = None) -> None:
    "The same for pairs, of which the shorter answer is the better one."
    import torch

    from fine_tune_llm.models.loading import load_model
    from fine_tune_llm.training.choices import load_pairs
    from fine_tune_llm.training.preference import prefer as learn
    torch.set_num_threads(1)
    try:
        pairs = load_pairs(rows or [dict(prompt=r["text"], chosen=f" it is {r['label']}", rejected=f" it is {r['label']} and {r['label']}") for r in weather()])
        learn(load_model(base, task="sft", device="cpu"), pairs, **options, **(dict(resume=out) if resume else dict(out=out)), progress=False)
    except FineTuneLLMError as e: Path(f"{out}.error").write_text(str(e))


def server() -> Any:
    "A process that has imported everything once, and forks."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    here, old = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([here, str(Path(here).parent), old])
    try: multiprocessing.forkserver.ensure_running()
    finally: os.environ["PYTHONPATH"] = old
    return context


def start(*args: Any, work: Any = train, **kwargs: Any) -> Any:
    "Start a training in a fork."
    process = server().Process(target=work, args=args, kwargs=kwargs)
    process.start()
    return process


def finish(*args: Any, **kwargs: Any) -> str:
    "Train to the end; the error, if there was one."
    process = start(*args, **kwargs)
    process.join(120)
    assert process.exitcode == 0, process.exitcode
    error = Path(f"{args[1]}.error")
    return error.read_text() if error.exists() else ""


def until(process: Any, condition: Any, seconds: float = 60) -> None:
    "Look again and again until something holds, or the process has ended."
    end = time.monotonic() + seconds
    while process.is_alive() and not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.005)


def steps(out: Path) -> int:
    "The last step in the events of a run."
    if not (out / "events.jsonl").exists(): return 0
    return max((e["step"] for e in Run.attach(out).events("step")), default=0)


def kill(process: Any) -> bool:
    "End a process without a warning; whether it was still at work."
    alive = process.is_alive()
    if alive: os.kill(process.pid, signal.SIGKILL)
    process.join()
    return alive


def adapter(out: Path) -> bytes:
    "The bytes of the trained adapter."
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


# Hooks: each makes one thing happen in the training process, which runs nothing else

def hold(out: Path) -> None:
    "Say that the moment has come, and wait to be killed."
    (out.parent / "held").touch()
    while True: time.sleep(1)


def in_second_checkpoint(out: Path) -> bool:
    return len(list((out / "checkpoints").glob("step-*"))) >= 2


def hold_half_an_optimizer_file(out: Path) -> None:
    import torch
    save = torch.save
    def half(obj: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        save(obj, file, *args, **kwargs)
        if in_second_checkpoint(out) and str(file).endswith("optimizer.pt"):
            os.truncate(file, os.path.getsize(file) // 2)
            hold(out)
    torch.save = half


def hold_before_the_manifest(out: Path) -> None:
    import fine_tune_llm.training.control as control
    seal = control.seal_checkpoint
    control.seal_checkpoint = lambda draft, place: hold(out) if in_second_checkpoint(out) else seal(draft, place)


def hold_after_the_manifest(out: Path) -> None:
    import fine_tune_llm.training.checkpoints as checkpoints
    force = checkpoints.force
    checkpoints.force = lambda path: hold(out) if in_second_checkpoint(out) and ".work" in str(path) else force(path)


def hold_between_two_renames(out: Path) -> None:
    "The same step is saved again, and the old one has just made room."
    import fine_tune_llm.training.checkpoints as checkpoints
    seal, replace = checkpoints.seal_checkpoint, os.replace
    import fine_tune_llm.training.control as control
    def twice(draft: Path, place: Path) -> None:
        if in_second_checkpoint(out):
            import shutil
            shutil.copytree(draft, copy := draft.with_name("copy"))
            seal(draft, place)
            os.replace = lambda a, b: (replace(a, b), hold(out)) if ".old" in str(b) else replace(a, b)
            seal(copy, place)
        seal(draft, place)
    control.seal_checkpoint = twice


def hold_while_old_ones_are_removed(out: Path) -> None:
    import fine_tune_llm.training.checkpoints as checkpoints
    def half(place: Path, *args: Any, **kwargs: Any) -> None:
        (place / "optimizer.pt").unlink()
        hold(out)
    checkpoints.shutil = type("shutil", (), dict(rmtree=staticmethod(half), disk_usage=None))


def hold_half_an_event(out: Path) -> None:
    import fine_tune_llm.core.runs as runs
    append = runs.append
    def half(tail: Any, line: str) -> None:
        if in_second_checkpoint(out) and '"event":"step"' in line:
            with open(tail.path, "ab") as f: f.write(line.encode()[:50])
            hold(out)
        append(tail, line)
    runs.append = half


def full(out: Path) -> None:
    if in_second_checkpoint(out): raise OSError(28, "No space left on device")


def full_torch_save(out: Path) -> None:
    import torch
    save = torch.save
    torch.save = lambda obj, file, *args, **kwargs: (full(out), save(obj, file, *args, **kwargs))


def full_manifest(out: Path) -> None:
    import fine_tune_llm.training.checkpoints as checkpoints
    describe = checkpoints.describe_file
    def described(path: Path) -> Any:
        if ".work" in str(path): full(out)
        return describe(path)
    checkpoints.describe_file = described


def full_adapter(out: Path) -> None:
    import peft
    save = peft.PeftModel.save_pretrained
    def filled(self: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
        save(self, folder, *args, **kwargs)
        if ".work" in str(folder): full(out)
    peft.PeftModel.save_pretrained = filled


def set_after_checkpoint(out: Path) -> None:
    "Halve the rate at step 10, one step after a checkpoint."
    import fine_tune_llm.training.control as control
    answer = control.answer
    def asked(run: Any, now: Any, commands: Any, **more: Any) -> None:
        if now.step == 10 and not run.commands(): run.set(times=0.5)
        answer(run, now, commands, **more)
    control.answer = asked


def stop_at_five(out: Path) -> None:
    import fine_tune_llm.training.control as control
    heard = control.heard
    def asked(listener: Any) -> Any:
        if os.environ.get("RANK") == "0" and len(listener.run.events("step")) == 4 and not listener.run.commands(): listener.run.stop()
        return heard(listener)
    control.heard = asked
