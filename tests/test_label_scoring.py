"""Label words, choices and generation: every way against one text at a time, on many architectures, real tokenizers and a real small decoder."""
import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from fine_tune_llm.core.errors import DataError, InferenceError, ModelError
from fine_tune_llm.core.labels import Labels
from fine_tune_llm.data.splits import Split
from fine_tune_llm.data.templates import chat, completion, label_words
from fine_tune_llm.data.truth import data_truth
from fine_tune_llm.models.adapters import add_adapter
from fine_tune_llm.models.choices import letter_choices, score_choices
from fine_tune_llm.models.generation import generate_answers, token_log_probs
from fine_tune_llm.models.label_forward import WAYS, tree_scores
from fine_tune_llm.models.label_scoring import (
    choose_way,
    content_free_prior,
    predict_label_words,
    score_asked,
    score_label_words,
)
from fine_tune_llm.models.label_tokens import Asked, ask_labels
from fine_tune_llm.models.label_trie import ancestors, build_trie
from fine_tune_llm.models.loading import build_causal, load_model
from fine_tune_llm.training.class_losses import CLASS_LOSSES, class_loss

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

SHARED = Path(__file__).parents[2] / "shared/data"
STORIES = SHARED / "models/stories260K"
real = pytest.mark.skipif(not STORIES.is_dir(), reason="the data folder ../shared/data is not here")
V = 61
SMALL = dict(vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, bos_token_id=1, eos_token_id=2, pad_token_id=0)
KV = {**SMALL, "num_key_value_heads": 1}
GPT = dict(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
MODELS = {  # name -> (configuration, the way that is right and fastest)
    "llama": (hf.LlamaConfig(**KV), "tree"), "qwen3": (hf.Qwen3Config(**KV, head_dim=8), "tree"), "phi": (hf.PhiConfig(**SMALL), "tree"),
    "gpt2, learned positions": (hf.GPT2Config(**GPT), "tree"), "opt, learned positions": (hf.OPTConfig(vocab_size=V, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=2,
                                                                                                 num_attention_heads=2, max_position_embeddings=64), "tree"),
    "gpt-neox": (hf.GPTNeoXConfig(**SMALL), "tree"), "mixtral, experts": (hf.MixtralConfig(**KV, num_local_experts=2), "tree"),
    "granite, scaled logits": (hf.GraniteConfig(**KV, logits_scaling=3.0), "tree"), "mistral, wide window": (hf.MistralConfig(**KV, sliding_window=64), "tree"),
    "mistral, window of 8": (hf.MistralConfig(**KV, sliding_window=8), "cache"), "gemma2, window of 8": (hf.Gemma2Config(**KV, head_dim=8, sliding_window=8), "cache"),
    "gpt-neo, local layer": (hf.GPTNeoConfig(vocab_size=V, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8,
                                             bos_token_id=1, eos_token_id=2), "cache"),
    "bloom, alibi": (hf.BloomConfig(vocab_size=V, hidden_size=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2), "cache"),
    "mpt, alibi": (hf.MptConfig(vocab_size=V, d_model=16, n_layers=2, n_heads=2, max_seq_len=64), "cache"),
    "mamba, recurrent": (hf.MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4, bos_token_id=1, eos_token_id=2), "plain")}


def build(config, seed=0, std=0.3):
    "A random decoder whose attention matters."
    torch.manual_seed(seed)
    module = hf.AutoModelForCausalLM.from_config(config).eval()
    for p in module.parameters():
        if p.ndim > 1: torch.nn.init.normal_(p, std=std)
    return module


def naive(module, asked):
    "One text at a time, no padding, every logit."
    out = []
    with torch.inference_mode():
        for a in asked:
            for answer in a.answers:
                ids = torch.tensor([[*a.prompt, *answer]])
                logp = module(ids, use_cache=False).logits[0, len(a.prompt) - 1:-1].float().log_softmax(-1)
                out.append(float(logp.gather(1, ids[0, len(a.prompt):, None]).double().sum()))
    return np.array(out)


def random_asked(seed=0):
    rng = np.random.default_rng(seed)
    stem = rng.integers(3, V, 2)
    def fresh(n): return rng.integers(3, V, n).tolist()
    answers = tuple(tuple([*stem[:shared], *fresh(n)]) for shared, n in ((1, 3), (1, 1), (2, 2), (0, 1), (2, 4), (0, 3), (1, 0)))
    return [Asked(tuple(fresh(n)), answers) for n in (5, 20, 1, 30)]


@pytest.mark.parametrize("name", MODELS)
def test_every_way_is_exact_or_not_chosen(name):
    config, best = MODELS[name]
    module, asked = build(config), random_asked()
    truth = naive(module, asked)
    assert truth.std() > 1  # scores that a wrong mask would move
    assert choose_way(module, asked, 0) == best
    with torch.inference_mode():
        for way in list(WAYS)[list(WAYS).index(best):]:
            assert np.abs(torch.cat(WAYS[way](module, asked, 0)).numpy() - truth).max() < 1e-4, way


def test_the_check_catches_a_small_difference():
    "With weights as small as a fresh model's, attention hardly matters, and the wrong mask is still seen."
    module, asked = build(MODELS["mpt, alibi"][0], std=0.02), random_asked()
    assert choose_way(module, asked, 0) != "tree" or np.abs(torch.cat(tree_scores(module, asked, 0)).detach().numpy() - naive(module, asked)).max() < 1e-4


def test_a_window_longer_than_the_check():
    "Only the configuration tells: the check reads short prompts, which fit into the window."
    rng = np.random.default_rng(1)
    asked = [Asked(tuple(rng.integers(3, V, n).tolist()), random_asked()[0].answers) for n in (60, 34)]
    module = build(hf.MistralConfig(**KV, sliding_window=40))
    assert choose_way(module, asked[1:], 0) == "tree" and choose_way(module, asked, 0) == "cache"
    with torch.inference_mode(): found = {way: torch.cat(WAYS[way](module, asked, 0)).numpy() for way in WAYS}
    truth = naive(module, asked)
    assert np.abs(found["cache"] - truth).max() < 1e-4 < 1e-2 < np.abs(found["tree"] - truth).max()


def test_half_precision_stays_near():
    module, asked = build(MODELS["llama"][0]).bfloat16(), random_asked()
    assert choose_way(module, asked, 0) == "tree"
    with torch.inference_mode(): found = torch.cat(tree_scores(module, asked, 0)).numpy()
    np.testing.assert_allclose(found, naive(module.float(), asked), rtol=0.05, atol=0.2)


def test_eager_attention_too():
    config = hf.LlamaConfig(**KV)
    config._attn_implementation = "eager"
    module, asked = build(config), random_asked()
    assert choose_way(module, asked, 0) == "tree"


def test_trie_of_random_answers():
    rng = np.random.default_rng(0)
    for _ in range(50):
        answers = [tuple(rng.integers(0, 3, rng.integers(1, 6))) for _ in range(rng.integers(1, 12))]
        trie = build_trie(answers)
        assert len(trie) == len({a[:j] for a in answers for j in range(1, len(a))})
        path = [()]
        for token, parent, depth in zip(trie.tokens, trie.parent, trie.depth):
            path.append((*path[parent], token))
            assert len(path[-1]) == depth
        sees = ancestors(trie)
        for i, p in enumerate(path[1:]):
            assert {path[j + 1] for j in np.flatnonzero(sees[i])} == {p[:k + 1] for k in range(len(p))}
        told = [[] for _ in answers]
        for k, e in zip(trie.step_answer, trie.step_edge): told[k].append((path[trie.edge_node[e]], trie.edge_token[e]))
        assert [tuple(t for _, t in steps) for steps in told] == answers and all(len(before) == j for steps in told for j, (before, _) in enumerate(steps))


@pytest.fixture(scope="module")
def pocket():
    model = load_model("pocket", "label-words", device="cpu")
    return model, build_causal(model).eval()


NAMES = ["array", "array of numbers", "table", "picture", "a plot of something"]
TEXTS = ["Sort the rows.", "Plot a histogram of the values of a column.", "x", "Return the mean along an axis, or of all values where there is none."]


def test_company_order_and_batches_do_not_matter(pocket):
    model, module = pocket
    wanted = score_label_words(model, module, TEXTS, NAMES)
    assert np.abs(wanted.ravel() - naive(module, ask_labels(TEXTS, NAMES, model.tokenizer))).max() < 1e-4
    for size in (1, 3):
        assert np.abs(score_label_words(model, module, TEXTS, NAMES, batch_size=size) - wanted).max() < 1e-4
    order = [2, 4, 0, 1, 3]
    assert np.abs(score_label_words(model, module, TEXTS, [NAMES[i] for i in order]) - wanted[:, order]).max() < 1e-4


def test_tokens_are_those_of_training(pocket):
    tokenizer = pocket[0].tokenizer
    for template in (label_words(), label_words(ends="token"), completion("Say: {text}\n", "{label}!"), chat_of()):
        asked = ask_labels(TEXTS, NAMES, tokenizer, template)
        for text, a in zip(TEXTS, asked):
            truth = data_truth([{"text": text, "label": name} for name in NAMES], tokenizer, template)
            for answer, row in zip(a.answers, truth.examples()):
                assert [t for t in row["labels"] if t != -100] == list(answer)
                assert row["input_ids"][:len(a.prompt) + len(answer)] == [*a.prompt, *answer]


def chat_of():
    "A chat template over the columns of a classification."
    from fine_tune_llm.data.templates import Template
    inner = chat(style="plain")
    return Template("talk", lambda row, tok: inner.render({"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]}, tok))


def test_adapters_and_their_gradient(pocket):
    model, _ = pocket
    tuned = add_adapter(build_causal(model), {"r": 4}, 0).eval()
    for n, p in tuned.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(len(n)))
    asked = ask_labels(TEXTS, NAMES, model.tokenizer)
    scores = score_label_words(model, tuned, TEXTS, NAMES)
    assert np.abs(scores.ravel() - naive(tuned, asked)).max() < 1e-4
    assert np.abs(scores - score_label_words(model, build_causal(model), TEXTS, NAMES)).max() > 0.1
    y = torch.tensor([0, 3, 1, 2])
    for name in CLASS_LOSSES:  # the last name is "unsure" for those that abstain
        tuned.zero_grad()
        loss = class_loss(name)(torch.stack(tree_scores(tuned, asked, 0)), y).mean()
        loss.backward()
        moved = [p.grad.abs().max() for p in tuned.parameters() if p.requires_grad and p.grad is not None]
        assert torch.isfinite(loss) and len(moved) > 10 and max(moved) > 0


def test_prompt_tokens_that_are_learned_are_refused(pocket):
    from peft import PromptTuningConfig, get_peft_model
    model, _ = pocket
    module = get_peft_model(build_causal(model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="learned prompt tokens"): score_label_words(model, module, TEXTS, NAMES)


def test_priors_and_lengths(pocket):
    model, module = pocket
    plain = score_label_words(model, module, TEXTS, NAMES)
    given = np.log([0.5, 0.2, 0.1, 0.1, 0.1])
    np.testing.assert_allclose(score_label_words(model, module, TEXTS, NAMES, priors=given), plain - given)
    p = np.exp(score_label_words(model, module, ["N/A", "..."], NAMES))
    np.testing.assert_allclose(np.exp(content_free_prior(model, module, NAMES, texts=["N/A", "..."])), (p / p.sum(1, keepdims=True)).mean(0), atol=1e-6)
    chars = score_label_words(model, module, TEXTS, NAMES, normalize="characters")
    np.testing.assert_allclose(chars * [len(n) for n in NAMES], plain, atol=1e-9)


def test_choices_with_options_of_their_own(pocket):
    model, module = pocket
    questions = ["What is sorted?", "Which?", "How many rows?"]
    choices = [["the rows", "nothing at all"], ["a", "b", "c"], ["one", "two", "the number of rows of the table", "none"]]
    found = score_choices(model, module, questions, choices)
    for q, options, s in zip(questions, choices, found):
        asked = ask_labels([q], options, model.tokenizer, completion("{text}\nAnswer:", " {label}"))
        assert np.abs(s - naive(module, asked)).max() < 1e-4
    printed, letters = letter_choices(questions, choices)
    assert printed[0] == "What is sorted?\nA. the rows\nB. nothing at all" and letters[2] == ["A", "B", "C", "D"]


@pytest.mark.skipif(not (SHARED / "mcq").is_dir(), reason="the data folder ../shared/data is not here")
def test_commonsense_questions(pocket):
    model, module = pocket
    with open(SHARED / "mcq/csqa_dev_rand_split.jsonl", encoding="utf-8") as f: rows = [json.loads(line) for line, _ in zip(f, range(12))]
    questions, choices = [r["question"] for r in rows], [r["choices"]["text"] for r in rows]
    found = np.stack(score_choices(model, module, questions, choices))
    asked = [ask_labels([q], c, model.tokenizer, completion("{text}\nAnswer:", " {label}"))[0] for q, c in zip(questions, choices)]
    assert found.shape == (12, 5) and np.abs(found.ravel() - naive(module, asked)).max() < 1e-4


def test_generated_tokens_have_their_probability(pocket):
    model, module = pocket
    answers = generate_answers(model, module, ["Sort the", "Returns\n-------\n"], n=3, temperature=0.7, top_p=0.9, max_new_tokens=8, seed=5)
    assert answers.log_probs.shape == answers.finished.shape == (2, 3) and len({t for row in answers.texts for t in row}) > 3
    for prompt, row, values in zip(answers.prompts, answers.tokens, answers.token_log_probs):
        first = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        examples = [{"input_ids": [*first, *tokens], "labels": [-100] * len(first) + tokens} for tokens in row]
        for a, b in zip(token_log_probs(model, module, examples, batch_size=2), values): np.testing.assert_allclose(a, b, atol=1e-4)
        asked = [Asked(tuple(first), tuple(map(tuple, row)))]
        assert np.abs(naive(module, asked) - [v.sum() for v in values]).max() < 1e-4
    other = generate_answers(model, module, ["Sort the"], n=3, temperature=0.7, top_p=0.9, max_new_tokens=8, seed=6)
    assert other.texts[0] != answers.texts[0]


def test_an_end_token_ends_an_answer(pocket):
    model, _ = pocket
    module = build_causal(model)
    end = model.tokenizer.eos_token_id
    head = torch.nn.Linear(256, 4096, bias=True)
    head.weight.data, head.bias.data = module.lm_head.weight.data.clone(), torch.zeros(4096)
    head.bias.data[end] = 40.0
    module.lm_head = head
    answers = generate_answers(model, module, ["Sort"], n=2, max_new_tokens=4)
    assert answers.tokens == [[[end], [end]]] and answers.finished.all() and answers.texts == [["", ""]]
    assert answers.log_probs.min() > -1e-3 and answers.lengths.tolist() == [[1, 1]]


@real
def test_real_decoder_knows_its_stories():
    "A decoder that has read children's stories finds the fitting word, and writes a story that begins like one."
    model = load_model(STORIES, "label-words", device="cpu")
    module = build_causal(model)
    texts = ["Tom threw the", "Lily was very sad. She started to", "The sun was in the", "Ben was hungry. He wanted to eat an"]
    words = Labels(("ball", "cry", "sky", "apple"))
    split = Split("test", texts, np.array(list("abcd")), np.arange(4), words)
    raw = predict_label_words(model, module, split, label_words("{text}", " {label}"))
    fair = predict_label_words(model, module, split, label_words("{text}", " {label}"), priors="content-free")
    assert (raw.answers == split.y).mean() >= 0.75 and (fair.answers == split.y).mean() >= 0.75
    asked = ask_labels(texts, list(words), model.tokenizer, label_words("{text}", " {label}"))
    assert np.abs(raw.logits.ravel() - naive(module, asked)).max() < 1e-4
    story = generate_answers(model, module, ["Once upon a time, there was a little"], temperature=0, max_new_tokens=12)
    assert "girl" in story.texts[0][0] and story.log_probs[0, 0] > -15


@real
def test_real_banking_names():
    model = load_model(STORIES, "label-words", device="cpu")
    module = build_causal(model)
    names = [n.replace("_", " ") for n in json.loads((SHARED / "intent/banking77_categories.json").read_text())]
    with gzip.open(SHARED / "intent/banking77_train.csv.gz", "rt", newline="", encoding="utf-8") as f: texts = [row["text"] for row, _ in zip(csv.DictReader(f), range(3))]
    asked = ask_labels(texts, names, model.tokenizer)
    found = np.concatenate(score_asked(model, module, asked))
    assert np.abs(found[:77] - naive(module, asked[:1])).max() < 1e-4


def test_refusals(pocket):
    model, module = pocket
    with pytest.raises(DataError, match="joins the end of the prompt"): score_label_words(model, module, TEXTS, NAMES, label_words("{text} ", "{label}"))
    with pytest.raises(DataError, match="no column 'intent'"): score_label_words(model, module, TEXTS, NAMES, label_words("{text}:", " {intent}"))
    with pytest.raises(DataError, match="is missing"): score_label_words(model, module, ["ok", ""], NAMES)
    with pytest.raises(InferenceError, match="over 512 tokens"): generate_answers(model, module, ["word " * 505], max_new_tokens=16)
