"""Prompts and prefixes in front of every kind of model that transformers has: what n words in front would do, or no."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, BODY, FROM_PAD, IDS, NO_PREFIX, NO_PROMPT, V

from minipeft.attach import attach
from minipeft.methods.lora import LoRA
from minipeft.methods.prefix import PrefixTuning
from minipeft.methods.prompt import PromptTuning
from minipeft.methods.select import Softmax
from minipeft.reading import is_pair, longest
from minipeft.serve.checkpoint import load_adapter

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = [9, 14, 17]
N = len(WORDS)

TEXT = [name for name, one in ARCHITECTURES.items() if one.kind in ("causal", "encoder", "pair")]
SPEECH = ["Whisper", "Speech2Text"]
CAUSAL = [name for name, one in ARCHITECTURES.items() if one.kind == "causal"]
TAKE_PROMPT = [name for name in TEXT if name not in NO_PROMPT]
TAKE_PREFIX = [name for name in TEXT + SPEECH if name not in NO_PREFIX]


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


def with_words(batch: dict, mask: torch.Tensor | None = None) -> dict:
    """The batch with the words really there, as the caller of the bare model would write it."""
    rows = len(batch["input_ids"])
    more = batch | {"input_ids": torch.cat([torch.tensor([WORDS]).expand(rows, -1), batch["input_ids"]], 1)}
    if "bbox" in batch:
        more["bbox"] = torch.cat([torch.zeros(rows, N, 4, dtype=torch.long), batch["bbox"]], 1)
    if mask is not None:
        more["attention_mask"] = torch.cat([mask.new_ones(rows, N), mask], 1)
    return more


def padded(one, model, left: bool) -> tuple[dict, torch.Tensor]:
    """A batch whose second row has three tokens less, and its mask."""
    batch = one.batch()
    mask = torch.ones_like(batch["input_ids"])
    mask[1, slice(0, 3) if left else slice(4, 7)] = 0
    pad = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    return batch | {"input_ids": batch["input_ids"].masked_fill(mask == 0, pad)}, mask


# -- positions --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TAKE_PROMPT)
@torch.no_grad()
def test_a_prompt_of_words_is_the_words(name):
    """Without a mask, with one, and with padding behind: the same positions, scale and neighbours."""
    one = ARCHITECTURES[name]
    model = one.model()
    tuned = attach(one.model(), PromptTuning(N, init=WORDS))
    short, mask = padded(one, model, left=False)
    for batch, mask in ((one.batch(), None), (one.batch(), torch.ones_like(mask)), (short, mask)):  # noqa: B020
        expected = one.hidden(model(**with_words(batch, mask)))
        found = one.hidden(tuned(**batch, **({} if mask is None else {"attention_mask": mask})))
        if found.shape != expected.shape:
            expected = expected[:, N:]
        if found.shape[:2] == (2, 7) and mask is not None:
            found, expected = found[mask.bool()], expected[mask.bool()]
        same(found, expected)
    assert (one.hidden(tuned(**batch)) - one.hidden(model(**batch))).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in NO_PREFIX])
@torch.no_grad()
def test_a_prefix_of_words_is_the_words(name):
    one = ARCHITECTURES[name]
    tuned = attach(one.model(), PrefixTuning(N, init=WORDS))
    expected, found = one.hidden(one.model()(**with_words(one.batch()))), one.hidden(tuned(**one.batch()))
    same(found, expected if expected.shape == found.shape else expected[:, N:])


READ_PADDING = ("RWKV", "RecurrentGemma", "GPT")  # these models take no notice of the mask, or number padding too
# Between a prefix and the text lies the padding, and for these the distance counts.
NEAR = ("GPT-Neo", "MPT", "Gemma-2", "Gemma-3", "Mistral", "gpt-oss", "ModernBERT, decoder")


@pytest.mark.parametrize("method", [PromptTuning(N), PrefixTuning(N)], ids=["prompt", "prefix"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in NO_PROMPT])
@torch.no_grad()
def test_rows_of_unequal_length_equal_each_row_alone(name, left, method):
    prefix = isinstance(method, PrefixTuning)
    if (prefix and name in NO_PREFIX) or (left and name in READ_PADDING):
        pytest.skip("no prefix, or the bare model itself differs")
    one = ARCHITECTURES[name]
    tuned = attach(one.model(), method)
    batch, mask = padded(one, tuned, left)
    if left and prefix and name in NEAR:
        with pytest.raises(ValueError, match="would count that as distance"):
            tuned(**batch, attention_mask=mask)
        return
    together = one.hidden(tuned(**batch, attention_mask=mask))[1]
    alone = one.hidden(tuned(input_ids=batch["input_ids"][1:, mask[1].bool()]))[0]
    same(together[mask[1].bool()] if together.ndim == alone.ndim == 2 else together, alone)


@pytest.mark.parametrize("name", ["XLM-R", "CamemBERT, tokens", "Data2Vec", "MPNet", "LUKE", "GPT-2", "Phi", "BERT"])
@torch.no_grad()
def test_positions_that_the_caller_gives_are_counted_on(name):
    one = ARCHITECTURES[name]
    model, batch = one.model(), one.batch()
    first = 2 if one.settings.items() >= FROM_PAD.items() else 0
    tuned = attach(one.model(), PromptTuning(N, init=WORDS))
    expected = one.hidden(model(**with_words(batch)))[:, N:]
    for given in (torch.arange(first, first + 7).expand(2, -1), torch.arange(first, first + 7)[None]):
        same(one.hidden(tuned(**batch, position_ids=given)), expected)
        same(one.hidden(tuned(**batch, position_ids=given, attention_mask=torch.ones(2, 7))), expected)


@torch.no_grad()
def test_a_placeholder_is_no_padding_whatever_the_padding_s_id():
    for padding in (0, 1, 3):
        config = transformers.XLMRobertaConfig(**IDS | BODY | dict(pad_token_id=padding))
        model = transformers.XLMRobertaModel(config).eval()
        batch = ARCHITECTURES["XLM-R"].batch()
        expected = model(**with_words(batch)).last_hidden_state[:, N:]
        same(attach(model, PromptTuning(N, init=WORDS))(**batch).last_hidden_state, expected)


def test_a_text_is_as_long_as_there_are_positions():
    for name, limit in (("RoBERTa", 62), ("MPNet", 62), ("BERT", 64), ("GPT-2", 64), ("Bloom", None), ("BART", 64)):
        assert longest(ARCHITECTURES[name].model()) == limit, name
    model = ARCHITECTURES["RoBERTa"].model()
    tuned = attach(model, PromptTuning(N))
    assert tuned(torch.full((1, 59), 7)).logits.shape[1] == 59
    with pytest.raises(ValueError, match="3 vectors in front and 60 tokens are more than the 62 positions"):
        tuned(torch.full((1, 60), 7))
    assert tuned._front.count() == N


# -- what cannot have one says so -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NO_PROMPT | NO_PREFIX)
def test_what_cannot_have_one_says_so_at_attach(name):
    """What can, attaches in the tests below."""
    for method, refused in ((PromptTuning(2), NO_PROMPT), (PrefixTuning(2), NO_PREFIX)):
        model = ARCHITECTURES[name].model()
        flags = [p.requires_grad for p in model.parameters()]
        if name not in refused:
            continue
        with pytest.raises(ValueError, match=refused[name]) as caught:
            attach(model, method)
        assert "\n" not in str(caught.value) and type(model).__name__ in str(caught.value)
        assert flags == [p.requires_grad for p in model.parameters()] and not hasattr(model, "_tuned")


@pytest.mark.parametrize(
    "head, said",
    [
        ("BertForMultipleChoice", "several"),
        ("XLMForQuestionAnswering", "single places"),
        ("FunnelForPreTraining", "single places"),
        ("TapasForQuestionAnswering", "single places"),
        ("ViTForImageClassification", "token embeddings"),
        ("IBertForMaskedLM", "token embeddings"),
    ],
)
def test_heads_and_inputs_that_take_no_prompt(head, said):
    cls = getattr(transformers, head)
    small = {"XLMForQuestionAnswering": dict(emb_dim=16, n_layers=1, n_heads=2)}.get(
        head, dict(d_model=16, block_sizes=[1], n_head=2, d_head=8, d_inner=16) if "Funnel" in head else BODY
    )
    with pytest.raises(ValueError, match=said):
        attach(cls(cls.config_class(**IDS | small)), PromptTuning(2))


@pytest.mark.parametrize("name", TAKE_PREFIX)
@torch.no_grad()
def test_a_prefix_has_an_effect_with_and_without_masks_and_caches_and_from_a_file(name, tmp_path):
    one = ARCHITECTURES[name]
    tuned, batch = attach(one.model(), PrefixTuning(N), seed=1), one.batch()
    found = one.hidden(tuned(**batch))
    mask = "decoder_attention_mask" if is_pair(tuned.base) else "attention_mask"
    tokens = batch["decoder_input_ids" if is_pair(tuned.base) else "input_ids"]
    same(one.hidden(tuned(**batch, **{mask: torch.ones_like(tokens)})), found)
    if "use_cache" in getattr(tuned.base.config, "__dict__", {}):
        without = tuned(**batch, use_cache=False)
        same(one.hidden(without), found)
        assert without.get("past_key_values") is None
    fresh = one.model()
    assert (found - one.hidden(fresh(**batch))).abs().max() > 1e-3
    tuned.save(tmp_path)
    assert torch.equal(one.hidden(load_adapter(fresh, tmp_path)(**batch)), found)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_model_and_the_generator_alone(training):
    model = ARCHITECTURES["GPT-2"].model().train(training)
    model.transformer.h[0].eval()
    modes, random = [m.training for m in model.modules()], torch.random.get_rng_state()
    attach(model, PrefixTuning(2))
    assert modes == [m.training for m in model.modules()] and torch.equal(random, torch.random.get_rng_state())


# -- generate ---------------------------------------------------------------------------------------------------------
SPEAKS = [
    "GPT-Neo", "Bloom", "MPT", "Falcon, one key-value head", "Gemma-2", "Gemma-3", "Mistral", "gpt-oss", "Cohere",
    "ModernBERT, decoder", "GPT-BigCode, one key-value head", "DeepSeek-V3", "Jamba", "Bamba", "LFM2", "Qwen3-Next",
    "Mamba", "Mamba-2", "FalconMamba", "RecurrentGemma", "RWKV", "GPT", "CTRL", "RoBERTa, decoder", "XGLM", "BioGPT",
]  # fmt: skip
FORGET = ("RWKV",)  # its own cache gives other tokens than none, on the bare model


@pytest.mark.parametrize("name", SPEAKS)
@torch.no_grad()
def test_generate_goes_on_behind_the_prompt_as_behind_the_words(name):
    """Over windows of four, and with a recurrent state that must read the prompt once."""
    one = ARCHITECTURES[name]
    ids = one.batch()["input_ids"]
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    full = with_words({"input_ids": ids})["input_ids"]
    expected = one.model().generate(full, attention_mask=torch.ones_like(full), **options)[:, N:]
    tuned = attach(one.model(), PromptTuning(N, init=WORDS))
    calls = []
    tuned.base.get_input_embeddings().register_forward_hook(lambda m, args, output: calls.append(output.shape[1]))
    found = tuned.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(found, expected)
    if name not in ("GPT", "MPT"):  # which keep no cache unless asked
        assert calls == [7 + N] + [1] * 7
    if name not in FORGET:
        assert torch.equal(tuned.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options), found)


@pytest.mark.parametrize("name", [name for name in SPEAKS if name not in NO_PREFIX])
@torch.no_grad()
def test_generate_behind_a_prefix_with_and_without_a_cache(name):
    one = ARCHITECTURES[name]
    tuned = attach(one.model(), PrefixTuning(N))
    batch, mask = padded(one, tuned, left=True)
    mask = torch.ones_like(mask) if name in NEAR else mask
    options = dict(attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(
        tuned.generate(batch["input_ids"], **options), tuned.generate(batch["input_ids"], use_cache=False, **options)
    )


# -- an encoder and a decoder -----------------------------------------------------------------------------------------
OTHERWISE = ("UMT5", "ProphetNet")  # generate other tokens with their cache than without, also bare
PAIRS = [name for name, one in ARCHITECTURES.items() if one.kind == "pair"]


@pytest.mark.parametrize("name", PAIRS + SPEECH)
@pytest.mark.parametrize("method", [PromptTuning(N, init=WORDS), PrefixTuning(N)], ids=["prompt", "prefix"])
@torch.no_grad()
def test_a_pair_generates_with_a_front(name, method):
    prompt = isinstance(method, PromptTuning)
    if name in (NO_PROMPT if prompt else NO_PREFIX):
        pytest.skip("listed with its reason above")
    one = ARCHITECTURES[name]
    tuned = attach(one.model(), method)
    text, mask = padded(one, tuned, left=False) if name in PAIRS else (one.batch(), None)
    text = {key: value for key, value in text.items() if key != "decoder_input_ids"}
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False) | (
        {} if mask is None else {"attention_mask": mask}
    )
    found = tuned.generate(**text, **options)
    if prompt:
        words = with_words(text, mask)
        bare = {key: value for key, value in options.items() if key != "attention_mask"}
        assert torch.equal(found, one.model().generate(**words, **bare))
    if name not in OTHERWISE:
        assert torch.equal(found, tuned.generate(**text, **options, use_cache=False))
    with tuned.disabled():
        assert torch.equal(tuned.generate(**text, **options), one.model().generate(**text, **options))


@torch.no_grad()
def test_encoder_outputs_go_with_the_prompt_that_made_them():
    one = ARCHITECTURES["BART"]
    tuned, batch = attach(one.model(), PromptTuning(N)), one.batch()
    ids, mask = batch.pop("input_ids"), torch.ones(2, 7, dtype=torch.long)
    expected = tuned(input_ids=ids, attention_mask=mask, **batch).logits
    encoded = tuned.get_encoder()(input_ids=ids, attention_mask=mask)
    same(tuned(encoder_outputs=encoded, attention_mask=mask, **batch).logits, expected)
    with tuned.disabled():
        bare = tuned.get_encoder()(input_ids=ids)
    with pytest.raises(ValueError, match="holds 7 states, and with the prompt there must be 10"):
        tuned(encoder_outputs=bare, attention_mask=mask, **batch)


@torch.no_grad()
def test_a_pair_has_both_in_front_and_a_decoder_s_prefix_cannot_be_words():
    one = ARCHITECTURES["T5"]
    tuned, batch = attach(one.model(), [PromptTuning(2), PrefixTuning(3)]), one.batch()
    both = tuned(**batch).logits
    for method in (PromptTuning(2), PrefixTuning(3)):
        assert (attach(one.model(), method)(**batch).logits - both).abs().max() > 1e-3
    ids = tuned.generate(batch["input_ids"], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(
        ids, tuned.generate(batch["input_ids"], max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=False)
    )
    with pytest.raises(ValueError, match="cannot start as tokens"):
        attach(one.model(), PrefixTuning(3, init=WORDS))


# -- what goes in and comes out with the tokens -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "head",
    [
        "ElectraForQuestionAnswering",
        "RobertaForQuestionAnswering",
        "GPT2ForQuestionAnswering",
        "DistilBertForQuestionAnswering",
        "LlamaForQuestionAnswering",
        "LongformerForQuestionAnswering",
    ],
)
@torch.no_grad()
def test_answers_are_counted_in_tokens(head):
    """Their places, one of them behind the text, which takes no part in the loss."""
    cls = getattr(transformers, head)
    torch.manual_seed(0)
    model = cls(
        cls.config_class(
            **IDS
            | {k: v for k, v in BODY.items()}
            | ({"sep_token_id": 5, "attention_window": 4} if "Longformer" in head else {})
            | (dict(dim=16, n_heads=4) if "Distil" in head else {})
        )
    ).eval()
    ids = torch.randint(6, V, (2, 7))
    if "Longformer" in head:  # it looks for the three marks behind the question
        ids[:, [2, 3, 6]] = 5
    start, end = torch.tensor([1, 3]), torch.tensor([4, 50])
    full = with_words({"input_ids": ids})["input_ids"]
    expected = model(full, start_positions=start + N, end_positions=end + N)
    found = attach(model, PromptTuning(N, init=WORDS))(ids, start_positions=start, end_positions=end)
    same(found.loss, expected.loss)
    assert found.start_logits.shape == found.end_logits.shape == (2, 7)
    same(found.start_logits, expected.start_logits[:, N:])


@pytest.mark.parametrize("name", ["BERT, classifier", "RoBERTa, classifier", "Llama, classifier", "GPT-2, classifier"])
@torch.no_grad()
def test_labels_of_a_text_may_be_as_many_as_its_tokens(name):
    one = ARCHITECTURES[name]
    cls = getattr(transformers, one.head)
    config = cls.config_class(**IDS | one.settings | dict(num_labels=7, problem_type="multi_label_classification"))
    tuned = attach(cls(config).eval(), PromptTuning(N))
    batch, labels = one.batch(), torch.randint(2, (2, 7)).float()
    output = tuned(**batch, labels=labels)
    same(output.loss, torch.nn.functional.binary_cross_entropy_with_logits(output.logits, labels))
    ten = attach(cls(cls.config_class(**IDS | one.settings | dict(num_labels=7 + N))).eval(), PromptTuning(N))
    assert ten(**batch).logits.shape == (2, 7 + N)


@torch.no_grad()
def test_masks_of_global_attention_boxes_and_types_grow_with_the_text():
    for name, extra, value in (
        ("Longformer", "global_attention_mask", torch.tensor([[1, 0, 0, 1, 0, 0, 0]] * 2)),
        ("LED", "global_attention_mask", torch.tensor([[1, 0, 0, 1, 0, 0, 0]] * 2)),
        ("LayoutLM", "token_type_ids", torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)),
        ("ERNIE", "token_type_ids", torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)),
        ("ModernBERT", "attention_mask", torch.ones(2, 7, dtype=torch.bool)),
    ):
        one = ARCHITECTURES[name]
        tuned, batch = attach(one.model(), PromptTuning(N, init=WORDS)), one.batch()
        more = torch.cat([torch.full((2, N), extra == "attention_mask", dtype=value.dtype), value], 1)
        expected = one.hidden(one.model()(**with_words(batch), **{extra: more}))
        found = one.hidden(tuned(**batch, **{extra: value}))
        same(found, expected[:, -found.shape[1] :])


@torch.no_grad()
def test_a_tuple_is_cut_as_what_has_names():
    for name in ("BERT, answers", "Llama, classifier", "BERT", "Mamba", "XLM"):
        one = ARCHITECTURES[name]
        tuned, batch = attach(one.model(), PromptTuning(N)), one.batch()
        named, plain = tuned(**batch), tuned(**batch, return_dict=False)
        assert isinstance(plain, tuple)
        assert torch.equal(plain[0], one.hidden(named))


@torch.no_grad()
def test_embeddings_instead_of_ids_stand_behind_the_prompt_too():
    for name in ("Gemma", "XLM-R", "OPT", "BART", "Longformer", "Mamba"):
        one = ARCHITECTURES[name]
        tuned, batch = attach(one.model(), PromptTuning(N)), one.batch()
        expected = one.hidden(tuned(**batch))
        part = tuned.get_encoder() if is_pair(tuned.base) else tuned
        with tuned.disabled():
            embeds = part.get_input_embeddings()(batch.pop("input_ids"))
        same(one.hidden(tuned(inputs_embeds=embeds, **batch)), expected)


# -- models that see --------------------------------------------------------------------------------------------------
def qwen_vl() -> torch.nn.Module:
    turns = {"type": "mrope", "mrope_section": [1, 1, 0]}
    config = transformers.Qwen2VLConfig(
        text_config=IDS | BODY | dict(num_key_value_heads=2, rope_scaling=turns),
        vision_config=dict(depth=1, embed_dim=16, hidden_size=16, num_heads=2, patch_size=4, spatial_merge_size=1),
        image_token_id=5, vision_start_token_id=4, vision_end_token_id=3, video_token_id=6,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def blip() -> torch.nn.Module:
    text = IDS | BODY | dict(encoder_hidden_size=16, projection_dim=16)
    seen = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24)
    sight = seen | dict(image_size=16, patch_size=8)
    config = transformers.BlipConfig(text_config=text, vision_config=sight, projection_dim=16)
    return transformers.BlipForConditionalGeneration(config).eval()


@torch.no_grad()
def test_a_prefix_is_not_taken_for_what_was_generated_before():
    """Qwen-VL remembers how it numbered the pictures of a call, and a cache with a prefix looks like a call that goes
    on."""
    model, ids = qwen_vl(), torch.arange(7, 14).expand(2, -1)
    expected = model(with_words({"input_ids": ids})["input_ids"]).logits[:, N:]
    tuned = attach(model, PrefixTuning(N, init=WORDS))
    found = tuned(ids, attention_mask=torch.ones_like(ids)).logits
    same(found, expected)
    tuned.generate(ids, max_new_tokens=2, do_sample=False)
    assert torch.equal(tuned(ids, attention_mask=torch.ones_like(ids)).logits, found)
    with pytest.raises(ValueError, match="numbers words and pictures together"):
        tuned(ids, image_grid_thw=torch.tensor([[1, 2, 2]]), mm_token_type_ids=torch.zeros_like(ids))


@torch.no_grad()
def test_a_prompt_by_which_generate_passes_is_an_error_and_no_silence():
    tuned, batch = attach(blip(), PromptTuning(2)), {"input_ids": torch.full((1, 4), 9)}
    batch["pixel_values"] = torch.ones(1, 3, 16, 16)
    with pytest.raises(ValueError, match="was not read: generate of BlipForConditionalGeneration calls a part"):
        tuned.generate(**batch, max_new_tokens=2)
    with tuned.disabled():
        tuned.generate(**batch, max_new_tokens=2)
    assert {layer.path for layer in attach(tuned.detach(), Softmax()).layers()} == {
        "text_decoder.cls.predictions.decoder", "text_decoder.cls.predictions.bias",
    }  # fmt: skip


# -- files ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TAKE_PROMPT)
@torch.no_grad()
def test_a_prompt_can_be_saved_and_loaded(name, tmp_path):
    one = ARCHITECTURES[name]
    tuned, batch = attach(one.model(), PromptTuning(2), seed=1), one.batch()
    tuned.save(tmp_path)
    assert torch.equal(one.hidden(load_adapter(one.model(), tmp_path)(**batch)), one.hidden(tuned(**batch)))


def test_a_prompt_that_is_not_read_is_an_error_and_no_silence():
    """A model whose tokens go through another table than the one that it names."""
    model = ARCHITECTURES["BERT"].model()
    tuned = attach(model, [PromptTuning(2), LoRA(rank=1)])
    model.bert.embeddings.word_embeddings = torch.nn.Embedding(V, 16)
    with pytest.raises(ValueError, match="The prompt was not read"):
        tuned(**ARCHITECTURES["BERT"].batch())
