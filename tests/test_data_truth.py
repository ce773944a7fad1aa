"""What becomes of each token, against maps worked by hand, transformers' own assistant masks and TRL's way to prepare data."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fine_tune_llm.core.errors import ConfigurationError, DataError
from fine_tune_llm.data.files import read_rows
from fine_tune_llm.data.templates import chat, completion, label_words
from fine_tune_llm.data.token_map import FATES
from fine_tune_llm.data.truth import CUTS, data_truth
from fine_tune_llm.models.loading import locate

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the data folder ../shared/data is not here")
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}{{ '\\n' }}{{ m.content }}<|im_end|>{{ '\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}")
MARKED = ("{% for m in messages %}<|im_start|>{{ m.role }}{{ '\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
          "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}")
THINKING = CHATML.replace("assistant{{ '\\n' }}{% endif %}", "assistant{{ '\\n' }}think{{ '\\n' }}{% endif %}")
WORDS = [f"{k}{i}" for k in "qa" for i in range(40)] + ["user", "assistant", "system", "User:", "Assistant:", "Label:", "card", "loan", "arrival", "think"]


def words_tokenizer(bos=True, pad_is_eos=False, template=CHATML):
    "One token a word, and a line break is a word: every sequence can be written down by hand."
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, "\n", *WORDS])}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")])
    if bos: t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>" if bos else None, eos_token="</s>", unk_token="<unk>",
                                   pad_token="</s>" if pad_is_eos else "<pad>", additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    made.chat_template = template
    return made


def merging_tokenizer():
    "Letters, of which a and b merge to one token where they meet: a prompt that ends in a is no prefix."
    vocab = {c: i for i, c in enumerate(["<unk>", "</s>", "a", "b", "c", "x", "ab"])}
    t = Tokenizer(models.BPE(vocab, [("a", "b")], unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Split(Regex("x"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def fates(truth, place):
    "Tokens and fates of a row, as names."
    i = truth.rows.places.tolist().index(place)
    part = slice(truth.start[i], truth.start[i + 1])
    return truth.tokenizer.convert_ids_to_tokens(truth.ids[part].tolist()), [FATES[k] for k in truth.fates[part]]


def expect(truth, place, tokens, marks):
    "Compare with a map written by hand: m, s, t, d for the four fates."
    found, got = fates(truth, place)
    assert found == [t.replace("¶", "\n") for t in tokens.split(" ")]  # ¶ for a line break
    assert "".join(f[0] for f in got) == marks


KINDS = pytest.mark.parametrize("bos, pad_is_eos", [(b, p) for b in (True, False) for p in (True, False)])


# Maps by hand

@KINDS
def test_completion_map(bos, pad_is_eos):
    truth = data_truth([{"prompt": "q1 q2 q3", "completion": " a1 a2"}], words_tokenizer(bos, pad_is_eos), "completion")
    expect(truth, 1, "<s> q1 q2 q3 a1 a2 </s>"[0 if bos else 4:], "mmmmsss"[0 if bos else 1:])
    row = truth.table.iloc[0]
    assert row["end_supervised"] and row["bos"] == bos and row["prompt_is_prefix"] and row["kept"] and not row["answer_cut"]
    assert any("Padding and end are the same" in n for n in truth.notices) == pad_is_eos and len(truth.notices) == pad_is_eos


@KINDS
def test_completion_map_cut(bos, pad_is_eos):
    "Eight or seven tokens, five stay."
    rows, t = [{"prompt": "q1 q2 q3 q4", "completion": " a1 a2"}], words_tokenizer(bos, pad_is_eos)
    maps = {"end": ("dddddddd", "mmmmstt"), "prompt-left": ("mtttmsss", "ttmmsss"), "prompt-middle": ("mmtttsss", "mttmsss")}
    for how, (with_bos, without) in maps.items():
        truth = data_truth(rows, t, "completion", max_length=5, cut=how, on_cut="keep")
        assert "".join(f[0] for f in fates(truth, 1)[1]) == (with_bos if bos else without), how
    assert data_truth(rows, t, "completion", max_length=5, on_cut="drop").table["dropped"][0] == 7 + bos


@KINDS
def test_chat_map(bos, pad_is_eos):
    "The end of the turn is learned, the line break behind it is not; the template's own text gets no BOS on top."
    turns = [{"role": r, "content": c} for r, c in (("system", "q9"), ("user", "q1"), ("assistant", "a1"), ("user", "q2 q3"), ("assistant", "a2 a3"))]
    tokens = ("<|im_start|> system ¶ q9 <|im_end|> ¶ <|im_start|> user ¶ q1 <|im_end|> ¶ <|im_start|> assistant ¶ a1 <|im_end|> ¶ "
              "<|im_start|> user ¶ q2 q3 <|im_end|> ¶ <|im_start|> assistant ¶ a2 a3 <|im_end|> ¶")
    t = words_tokenizer(bos, pad_is_eos)
    both, last = data_truth([{"messages": turns}], t), data_truth([{"messages": turns}], t, chat("last"))
    expect(both, 1, tokens, "mmmmmm" "mmmmmm" "mmmssm" "mmmmmmm" "mmmsssm")
    expect(last, 1, tokens, "mmmmmm" "mmmmmm" "mmmmmm" "mmmmmmm" "mmmsssm")
    assert both.table["end_supervised"][0] and both.table["prompt_is_prefix"][0] and both.table["bos"][0] == 0


@KINDS
def test_plain_chat_map(bos, pad_is_eos):
    "The style for tokenizers without a chat template: BOS where the tokenizer puts it, the end token behind each answer."
    turns = [{"role": r, "content": c} for r, c in (("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2 a3"))]
    t = words_tokenizer(bos, pad_is_eos, template=None)
    truth = data_truth([{"messages": turns}], t, "chat-plain")
    cut = 0 if bos else 1
    expect(truth, 1, "<s> User: q1 ¶ Assistant: a1 </s> ¶ User: q2 ¶ Assistant: a2 a3 </s> ¶".split(" ", cut)[-1], "mmmmmssmmmmmsssm"[cut:])
    with pytest.raises(ConfigurationError, match="no chat template"): data_truth([{"messages": turns}], t)
    t.eos_token, t.pad_token = None, "<pad>"
    assert any("not taught to stop" in n for n in data_truth([{"messages": turns}], t, "chat-plain").notices)


@KINDS
def test_label_word_map(bos, pad_is_eos):
    rows = [{"text": "q1 q2", "label": "card"}, {"text": "q3", "label": "card arrival"}]
    t = words_tokenizer(bos, pad_is_eos)
    words, ended = data_truth(rows, t, label_words()), data_truth(rows, t, label_words(ends="token"))
    cut = 0 if bos else 1
    expect(words, 1, "<s> q1 q2 ¶ Label: card".split(" ", cut)[-1], "mmmmms"[cut:])
    expect(words, 2, "<s> q3 ¶ Label: card arrival".split(" ", cut)[-1], "mmmmss"[cut:])
    expect(ended, 1, "<s> q1 q2 ¶ Label: card </s>".split(" ", cut)[-1], "mmmmmss"[cut:])
    assert not words.table["end_supervised"].any() and ended.table["end_supervised"].all()
    assert not any("stop" in n for n in words.notices)  # a label word needs no end


def test_prompt_that_is_no_prefix():
    "c a | b: the prompt is (c, a), the whole (c, ab): they part at the second token, and the loss begins there."
    truth = data_truth([{"prompt": "ca", "completion": "b"}, {"prompt": "cx", "completion": "b"}], merging_tokenizer(), "completion")
    expect(truth, 1, "c ab </s>", "mss")
    expect(truth, 2, "c x b </s>", "mmss")
    assert truth.table["prompt_is_prefix"].tolist() == [False, True] and "In 1 of 2 rows what stands before" in truth.notices[0]


def test_thinking_template_is_no_prefix():
    "The question asks for a thought that the written conversation does not hold."
    turns = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}]
    truth = data_truth([{"messages": turns}], words_tokenizer(template=THINKING))
    expect(truth, 1, "<|im_start|> user ¶ q1 <|im_end|> ¶ <|im_start|> assistant ¶ a1 <|im_end|> ¶", "mmmmmmmmmssm")
    assert not truth.table["prompt_is_prefix"][0]


def test_answer_that_changes_once_the_talk_goes_on():
    "A template that takes out earlier thoughts: by comparison the first answer is lost to the loss; marks of the template, where it has them, keep it. Told in both."
    said = "m.content if loop.last else m.content.split('think ')[-1]"
    marked = MARKED.replace("{% generation %}{{ m.content }}", "{% generation %}{{ " + said + " }}") + "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
    turns = [{"role": r, "content": c} for r, c in (("user", "q1"), ("assistant", "think a1"), ("user", "q2"), ("assistant", "think a2"))]
    tokens = "<|im_start|> user ¶ q1 <|im_end|> ¶ <|im_start|> assistant ¶ a1 <|im_end|> ¶ <|im_start|> user ¶ q2 <|im_end|> ¶ <|im_start|> assistant ¶ think a2 <|im_end|> ¶"
    t = words_tokenizer()
    for style, first in (marked, "ss"), (marked.replace("{% generation %}", "").replace("{% endgeneration %}", ""), "mm"):
        truth = data_truth([{"messages": turns}], t, chat(style=style))
        expect(truth, 1, tokens, "mmmmmm" "mmm" + first + "m" "mmmmmm" "mmmsssm")
        assert not truth.table["prompt_is_prefix"][0] and "In 1 of 1 rows what stands before" in truth.notices[0]


def test_double_bos_is_told():
    t = words_tokenizer()
    truth = data_truth([{"prompt": "<s> q1", "completion": " a1"}, {"prompt": "q1", "completion": " a1"}], t, "completion")
    assert truth.table["bos"].tolist() == [2, 1] and any("In 1 of 2 rows more than one BOS" in n for n in truth.notices)


def test_markers_inside_the_text_do_not_move_the_loss():
    "A user who writes the marker, and an answer that repeats the question: a search for either would go wrong."
    rows = [{"prompt": "Label: q1\nLabel:", "completion": " q1"}, {"prompt": "a1 a1", "completion": " a1"}]
    truth = data_truth(rows, words_tokenizer(bos=False), "completion")
    expect(truth, 1, "Label: q1 ¶ Label: q1 </s>", "mmmmss")
    expect(truth, 2, "a1 a1 a1 </s>", "mmss")


def test_no_end_token_is_told():
    t = words_tokenizer()
    t.eos_token = None
    t.pad_token = "<pad>"
    truth = data_truth([{"prompt": "q1", "completion": " a1"}], t, "completion")
    expect(truth, 1, "<s> q1 a1", "mms")
    assert any("not taught to stop" in n for n in truth.notices)


# Other implementations

def trl_prepares(rows, tokenizer, max_length):
    "TRL 1.16, SFTTrainer._prepare_dataset in a few lines: tokenize, mask by common prefix, cut the end, drop what is masked."
    made = []
    for i, row in enumerate(rows):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        n = next((k for k, (a, b) in enumerate(zip(prompt, ids)) if a != b), min(len(prompt), len(ids)))
        labels = [-100] * n + ids[n:]
        if any(x != -100 for x in labels[:max_length]): made.append((i, ids[:max_length], labels[:max_length]))
    return made


def sixty_four():
    "40 prompts that fill 16 tokens, 20 answers that do not fit, 4 that do."
    def say(letter, n): return " ".join(f"{letter}{k % 40}" for k in range(n))
    return ([{"prompt": say("q", 16 + i), "completion": " a0"} for i in range(40)] +
            [{"prompt": say("q", 5), "completion": " " + say("a", 11 + i)} for i in range(20)] + [{"prompt": say("q", 4), "completion": " " + say("a", 4)}] * 4)


@KINDS
def test_measured_case_is_refused(bos, pad_is_eos):
    t = words_tokenizer(bos, pad_is_eos)
    longest = 16 + 39 + 2 + bos
    with pytest.raises(DataError) as e: data_truth(sixty_four(), t, "completion", max_length=16)
    assert str(e.value) == (f"max_length=16 cuts 60 of 64 answers: 20 lose their end, 40 are lost whole; the 99th percentile is {longest} tokens "
                            f"(list, rows 1, 2, 3, 4, 5, 6, 7, 8, ...). Fix: max_length={longest} cuts none, on_cut='drop' leaves these rows out")


@KINDS
def test_measured_case_in_numbers(bos, pad_is_eos):
    t = words_tokenizer(bos, pad_is_eos)
    truth, trl = data_truth(sixty_four(), t, "completion", max_length=16, on_cut="keep"), trl_prepares(sixty_four(), t, 16)
    assert len(trl) == 24 and sum(ids[-1] != t.eos_token_id for _, ids, _ in trl) == 20  # the measurement itself
    assert truth.summary["kept"] == 24 and truth.summary["kept_without_end"] == 20 and truth.summary["dropped"] == 40 and truth.summary["end_supervised"] == 4
    assert [(e["input_ids"], e["labels"]) for e in truth.examples()] == [(ids, labels) for _, ids, labels in trl]
    assert np.flatnonzero(truth.table["kept"]).tolist() == [i for i, _, _ in trl]
    dropped = data_truth(sixty_four(), t, "completion", max_length=16, on_cut="drop")
    assert dropped.summary["kept"] == 4 and all(e["labels"][-1] == t.eos_token_id for e in dropped.examples())


TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)
ROW = st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT.map(" ".__add__)})
TOKENIZERS = {(b, p): words_tokenizer(b, p) for b in (True, False) for p in (True, False)}
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(st.lists(ROW, min_size=1, max_size=6), st.sampled_from(list(TOKENIZERS)), st.integers(1, 24))
def test_examples_are_those_of_trl(rows, kind, max_length):
    t = TOKENIZERS[kind]
    truth = data_truth(rows, t, "completion", max_length=max_length, on_cut="keep")
    assert [(e["input_ids"], e["labels"]) for e in truth.examples()] == [(ids, labels) for _, ids, labels in trl_prepares(rows, t, max_length)]


@quick
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), st.booleans())
def test_chat_is_marked_as_transformers_marks_it(pairs, system):
    "A template with {% generation %} tells where the assistant speaks; the same template without it must give the same by comparison."
    turns = [{"role": "system", "content": "q9"}] * system + [t for q, a in pairs for t in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    t = words_tokenizer()
    marked = t.apply_chat_template(turns, chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    truth = data_truth([{"messages": turns}], t, chat(style=CHATML))
    assert truth.ids.tolist() == marked["input_ids"] and truth.fates.tolist() == marked["assistant_masks"] and truth.table["prompt_is_prefix"][0]


@pytest.mark.peers
def test_examples_are_those_of_the_real_trl():
    trl = pytest.importorskip("trl", minversion="1.0", reason="trl is not installed")
    from datasets import Dataset
    t = words_tokenizer()
    trainer = SimpleNamespace(_tokenizer=t, completion_only_loss=True, chat_template=None)
    args = trl.SFTConfig(max_length=16, bf16=False, use_cpu=True, report_to="none")
    rows = trl.SFTTrainer._prepare_dataset(trainer, Dataset.from_list(sixty_four()), t, args, False, None, "train")
    truth = data_truth(sixty_four(), t, "completion", max_length=16, on_cut="keep")
    assert len(rows) == 24 and [(r["input_ids"], r["labels"]) for r in rows] == [(e["input_ids"], e["labels"]) for e in truth.examples()]


# Laws

CHAT = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3).map(
    lambda pairs: {"messages": [t for q, a in pairs for t in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]})
LABELLED = st.fixed_dictionaries({"text": TEXT, "label": st.sampled_from(["card", "loan", "card arrival"])})
CASES = st.one_of(st.tuples(st.just("completion"), st.lists(ROW, min_size=1, max_size=5)), st.tuples(st.just("chat"), st.lists(CHAT, min_size=1, max_size=4)),
                  st.tuples(st.just("chat-plain"), st.lists(CHAT, min_size=1, max_size=4)), st.tuples(st.just("label-words"), st.lists(LABELLED, min_size=1, max_size=5)))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CASES, st.sampled_from(list(TOKENIZERS)), st.integers(1, 40), st.sampled_from(CUTS), st.sampled_from(["keep", "drop"]))
def test_fates_partition_every_sequence(case, kind, max_length, cut, on_cut):
    template, rows = case
    t = TOKENIZERS[kind]
    truth, whole = data_truth(rows, t, template, max_length=max_length, cut=cut, on_cut=on_cut), data_truth(rows, t, template, max_length=10**6)
    table, s = truth.table, truth.summary
    assert (table[list(FATES)].sum(axis=1) == table["tokens"]).all() and (table["tokens"] == np.diff(truth.start)).all()
    assert sum(s[f"{f}_tokens"] for f in FATES) == s["tokens"] == len(truth.ids) == len(truth.fates)
    assert s["kept"] + s["dropped"] == s["rows"] == len(rows)
    assert truth.ids.tolist() == whole.ids.tolist() and set(whole.fates) <= {0, 1}
    stays = table["masked"] + table["supervised"]
    assert (stays <= max_length).all() and (table["supervised"][table["kept"]] > 0).all() and (stays[~table["kept"]] == 0).all()
    learned = whole.fates == 1
    assert not (truth.fates[learned] == 0).any() and not (truth.fates[~learned] == 1).any()  # a cut moves no token from one side to the other
    full = table["kept"] & (table["tokens"] >= max_length)
    assert (stays[full] == max_length).all()  # no more is cut than must be
    examples = list(truth.examples())
    assert len(examples) == s["kept"] and sum(x != -100 for e in examples for x in e["labels"]) == s["supervised_tokens"]
    if on_cut == "drop": assert (table["kept"] == ~table["answer_cut"]).all()  # a cut prompt is no reason
    if cut != "end":  # an answer is cut only if it does not fit with what is never cut
        fits = (table["tokens"] <= max_length) | (table["answer_tokens"] + table["bos"] <= max_length) & (template in ("completion", "label-words"))
        assert not table["answer_cut"][fits].any()


@quick
@given(st.lists(ROW, min_size=1, max_size=6), st.integers(1, 24), st.sampled_from(CUTS))
def test_refused_if_and_only_if_an_answer_loses_a_token(rows, max_length, cut):
    t = TOKENIZERS[True, True]
    table = data_truth(rows, t, "completion", max_length=max_length, cut=cut, on_cut="keep").table
    lost, whole = table["answer_cut"], (table["answer_cut"] & (table["dropped"] > 0)).sum()
    try: data_truth(rows, t, "completion", max_length=max_length, cut=cut)
    except DataError as e: assert f"cuts {lost.sum()} of {len(rows)} answers: {lost.sum() - whole} lose their end, {whole} are lost whole;" in str(e) and lost.any()
    else: assert not lost.any()


def test_one_token_left_is_no_answer_lost_whole():
    rows = [{"prompt": "q1 q2", "completion": " a1 a2"}]
    for n, told in (4, "1 lose their end, 0 are lost whole"), (3, "0 lose their end, 1 are lost whole"):
        with pytest.raises(DataError, match=told): data_truth(rows, words_tokenizer(), "completion", max_length=n)


def test_the_advice_in_the_message_works():
    rows, t = [{"prompt": " ".join(WORDS[:20]), "completion": " a1 a2"}] * 3, words_tokenizer()
    with pytest.raises(DataError, match="max_length=24 cuts none, cut='prompt-left' keeps every answer, on_cut='drop'"): data_truth(rows, t, "completion", max_length=8)
    assert data_truth(rows, t, "completion", max_length=24).summary["truncated_tokens"] == 0
    assert data_truth(rows, t, "completion", max_length=8, cut="prompt-left").summary["end_supervised"] == 3
    with pytest.raises(DataError, match="max_length=3 cuts 3") as e: data_truth(rows, t, "completion", max_length=3)
    assert "prompt-left" not in str(e.value)


def test_row_is_shown_by_its_number_with_text_and_html():
    truth = data_truth(sixty_four(), words_tokenizer(), "completion", max_length=16, on_cut="keep")
    row = truth.row(41)
    assert repr(row).splitlines()[1:4] == ["  masked     <s> q0 q1 q2 q3 q4", "  supervised a0 a1 a2 a3 a4 a5 a6 a7 a8 a9", "  truncated  a10 </s>"]
    html = row._repr_html_()
    assert html.count('role="group"') == 3 and "supervised: 10" in html and "</s>" not in html.split("</style>")[1]
    frame = truth.to_frame()
    assert frame.loc[41, "truncated"] == 2 and frame.loc[64, "kept"] and len(frame) == 64


@pytest.mark.parametrize("template", ["completion", "instruction", "text", "label-words"])
def test_unknown_columns_are_named(template):
    with pytest.raises(DataError, match="no column '.*Fix: use one of: 'other'"): data_truth([{"other": "x"}], words_tokenizer(), template)


def test_settings_are_checked_before_any_work():
    for bad in {"cut": "start"}, {"on_cut": "raise"}, {"on_bad_row": "skip"}, {"max_length": 0}, {"template": "alpaca"}:
        with pytest.raises(ConfigurationError): data_truth([{"prompt": "q1", "completion": "a1"}], TOKENIZERS[True, True], **{"template": "completion", **bad})


# Kept on disk

def test_cache_is_decided_by_content(tmp_path):
    t, rows = words_tokenizer(), sixty_four()
    def run(rows=rows, tokenizer=t, template="completion", n=16): return data_truth(rows, tokenizer, template, max_length=n, on_cut="keep", cache=tmp_path)
    first = run()
    assert run().fingerprint == first.fingerprint == data_truth(rows, t, "completion", max_length=16, on_cut="keep").fingerprint and len(list(tmp_path.iterdir())) == 1
    assert run(n=40).fingerprint != first.fingerprint and len(list(tmp_path.iterdir())) == 1  # another length, the same tokens
    for change in dict(rows=rows[:-1]), dict(tokenizer=words_tokenizer(bos=False)), dict(template=completion("{prompt}", "{completion}", ends="none")):
        before = len(list(tmp_path.iterdir()))
        run(**change)
        assert len(list(tmp_path.iterdir())) == before + 1


def test_damaged_cache_is_made_again(tmp_path):
    t = words_tokenizer()
    def run(): return data_truth(sixty_four(), t, "completion", max_length=16, on_cut="keep", cache=tmp_path).fingerprint
    first = run()
    file, = tmp_path.iterdir()
    whole = file.read_bytes()
    for damage in b"", whole[:50], whole[:-30], b"PK\x03\x04" + whole[4:200], whole.replace(b"learn", b"burnt"):
        file.write_bytes(damage)
        assert run() == first and file.read_bytes() == whole
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half a file")
        raise OSError("no space left on device")
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError): data_truth(sixty_four(), words_tokenizer(), "completion", on_cut="keep", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


# Real tokenizers and real data

def test_pocket_tokenizer():
    "It puts an end token behind every text; behind a prompt it would be a mistake."
    t = AutoTokenizer.from_pretrained(locate("pocket"))
    truth = data_truth([{"prompt": "Return the", "completion": " sum of squares"}], t, "completion")
    ids = t("Return the", add_special_tokens=False)["input_ids"]
    assert truth.ids.tolist() == t("Return the sum of squares")["input_ids"] and truth.fates.tolist() == [0] * len(ids) + [1] * (len(truth.ids) - len(ids))
    assert (truth.ids == t.eos_token_id).sum() == 1 and truth.table["end_supervised"][0]


@needs_data
def test_stories_tokenizer():
    "BOS in front, padding is the end token, blanks as a part of words."
    t = AutoTokenizer.from_pretrained(SHARED / "models/stories260K")
    assert t.pad_token_id == t.eos_token_id
    truth = data_truth([{"prompt": "Once upon", "completion": " a time"}, {"prompt": "Once upon ", "completion": "a time"}], t, "completion")
    for place in 1, 2:
        names, got = fates(truth, place)
        assert names[0] == "<s>" and names[-1] == "</s>" and got[0] == "masked" and got[-1] == "supervised"
        assert t.convert_tokens_to_string([n for n, g in zip(names, got) if g == "supervised"][:-1]).strip() == "a time"
    assert truth.table["bos"].tolist() == [1, 1] and truth.table["prompt_is_prefix"].tolist() == [True, False]
    talk = [{"messages": [{"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "hello"), ("user", "you?"), ("assistant", "fine"))]}]
    plain = data_truth(talk, t, "chat-plain")
    names, got = fates(plain, 1)
    assert t.convert_tokens_to_string([n for n, g in zip(names, got) if g == "supervised"]).replace(" ", "") == "hello</s>fine</s>"
    with pytest.raises(ConfigurationError, match="no chat template"): data_truth(talk, t)


@needs_data
def test_chat_roles_file():
    "README of the file: lines 1, 2 and 8 usable, 3 to 7 named with a reason each."
    file, t = SHARED / "malformed/chat_roles.jsonl", words_tokenizer()
    with pytest.raises(DataError, match="5 of 8 rows cannot be used") as e: data_truth(file, t)
    for n, why in {3: "answer with no question", 4: "question without an answer", 5: r"turn 2 \(assistant\) is empty", 6: "unknown role 'wizard'", 7: "no turns"}.items():
        assert any(f"line {n}: " in part and why.replace("\\", "") in part for part in str(e.value).split("; ")), n
    truth = data_truth(file, t, on_bad_row="quarantine")
    assert truth.rows.places.tolist() == [1, 2, 8] and sorted(truth.quarantine) == [3, 4, 5, 6, 7] and truth.summary["rows"] == 8
    assert truth.summary["kept"] + truth.summary["quarantined"] == 8
    with pytest.raises(DataError, match="could not be rendered"): truth.row(5)


@needs_data
def test_gsm8k_counts():
    "Counted again with plain loops and transformers' own call."
    rows, t = read_rows(SHARED / "sft/gsm8k_test.jsonl.gz").frame.head(150).to_dict("records"), AutoTokenizer.from_pretrained(SHARED / "models/stories260K")
    school = completion("{question}\n", "{answer}")
    truth = data_truth(rows, t, school, max_length=512, on_cut="keep")
    lengths = [len(t(f"{r['question']}\n{r['answer']}")["input_ids"]) + 1 for r in rows]
    prompts = [len(t(f"{r['question']}\n")["input_ids"]) for r in rows]
    assert truth.table["tokens"].tolist() == lengths and (truth.table["tokens"] - truth.table["answer_tokens"]).tolist() == prompts
    cut = [n > 512 for n in lengths]
    assert truth.table["answer_cut"].tolist() == cut and any(cut) and not all(cut)
    assert truth.summary["dropped"] == sum(p >= 512 for p in prompts) and truth.summary["percentile_99"] == sorted(lengths)[int(np.ceil(.99 * 149))]


def test_huge_row_is_cut_and_counted():
    t = words_tokenizer()
    truth = data_truth([{"prompt": "q1 " * 50_000, "completion": " a1"}, {"prompt": "q1", "completion": " a1"}], t, "completion", max_length=32, cut="prompt-left")
    assert truth.table["truncated"].tolist() == [50_003 - 32, 0] and truth.summary["end_supervised"] == 2
    assert len(truth.row(1)._repr_html_()) < 200_000


def test_rows_from_json_are_placed_by_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(["", json.dumps({"prompt": "q1", "completion": " a1"}), "", json.dumps({"prompt": "q1", "completion": ""})]) + "\n")
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be used \(rows.jsonl, line 4: 'completion' is missing\)"): data_truth(file, words_tokenizer(), "completion")
    assert data_truth(file, words_tokenizer(), "completion", on_bad_row="quarantine").row(2).title.startswith("rows.jsonl, line 2: whole")
