"""Models that are changed after they were loaded or are used in ways of Transformers' own: frozen, trained, wrapped, derived from."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import EncoderDecoderCache, GenerationConfig, StaticCache

from t5_trt import (
    InputError,
    StrictModeError,
    TRTT5EncoderModel,
    TRTT5ForConditionalGeneration,
    UnsupportedModelError,
    compare,
    generate_many,
)
from t5_trt.compat import CACHE
from t5_trt.runtime import step_buffers
from tests.conftest import SHIPPED
from tests.stand_in_tensorrt import stand_in_session
from tests.tiny_models import batch, make_stock
from tests.tolerances import LOGITS_ATOL

REQUEST = {**batch(), "max_new_tokens": 8}
LABELS = torch.tensor([[5, 6, 7]] * 3)


@pytest.fixture
def pair() -> tuple[Any, Any]:
    stock = make_stock("t5-v1.1")
    return stock, TRTT5ForConditionalGeneration.from_model(copy.deepcopy(stock), num_threads=1)


def tokens(model: Any, **more: Any) -> list[list[int]]:
    return model.generate(**{**REQUEST, **more}).tolist()  # type: ignore[no-any-return]


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    stock = make_stock("t5-v1.1")
    for parameter in stock.encoder.parameters():
        parameter.requires_grad_(False)
    expected = trainable(stock)
    ours = TRTT5ForConditionalGeneration.from_model(stock, num_threads=1)
    assert 0 < len(expected) < len(list(stock.parameters())) and trainable(ours) == expected
    ours.save_pretrained(tmp_path)
    ours(**batch(), labels=LABELS, output_attentions=True)
    assert trainable(ours.reference) == trainable(ours) == trainable(stock) == expected


def _scale(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def _step(model: Any) -> None:
    """As the engines' session is open: a training step between two evaluations."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.zero_grad()
    (model(**batch(), labels=LABELS).loss * 3).backward()
    optimizer.step()
    model.eval()


def _head(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().roll(1, 0))


def _data(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.detach().roll(1, 0)


def _row(model: Any) -> None:
    with torch.no_grad():
        model.shared.weight[batch()["input_ids"][0, 0]] *= -3


def _block(model: Any) -> None:
    model.decoder.load_state_dict({name: t * 1.3 for name, t in model.decoder.state_dict().items()})


@pytest.mark.parametrize("change", [_scale, _head, _data, _row, _block])
@pytest.mark.parametrize("engine", ["onnxruntime", "stand-in"])
def test_changed_weights_are_used(pair: Any, monkeypatch: pytest.MonkeyPatch, engine: str, change: Any) -> None:
    stock, ours = pair
    if engine == "stand-in":
        monkeypatch.setattr(
            "t5_trt.modeling.adapted_model.open_session", lambda *_, **__: stand_in_session(ours, monkeypatch)
        )
    before = tokens(ours), tokens(ours, num_beams=3)
    assert before == (tokens(stock), tokens(stock, num_beams=3))
    session = ours.session
    assert ours.session is session
    for model in (stock, ours):
        change(model)
    after = tokens(ours), tokens(ours, num_beams=3)
    assert after == (tokens(stock), tokens(stock, num_beams=3))
    assert before != after and ours.session is not session
    with torch.no_grad():
        expected = stock(**batch(), decoder_input_ids=LABELS).logits
        torch.testing.assert_close(
            ours(**batch(), decoder_input_ids=LABELS).logits, expected, atol=LOGITS_ATOL, rtol=1e-5
        )
        change(stock), change(ours)
        states = stock.get_encoder()(**batch()).last_hidden_state
        torch.testing.assert_close(ours.get_encoder()(**batch()).last_hidden_state, states, atol=LOGITS_ATOL, rtol=1e-5)


def test_generates_between_training_steps() -> None:
    """The weights of the last step, as ``Seq2SeqTrainer(predict_with_generate=True)`` wants them."""
    stock = make_stock("t5-v1.1", dropout_rate=0.0)
    ours = TRTT5ForConditionalGeneration.from_model(copy.deepcopy(stock), num_threads=1)
    seen = []
    for _ in range(3):
        assert tokens(ours) == tokens(stock)
        seen.append(tokens(ours))
        _step(stock), _step(ours)
    assert seen[0] != seen[-1]
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(dict(ours.named_parameters())[name], parameter, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD", "Adagrad"])
def test_fused_optimizers_are_noticed(pair: Any, kind: str) -> None:
    """The default of Transformers' Trainer; they change weights without counting versions."""
    before = [tokens(model) for model in pair]
    for model in pair:
        model(**batch(), labels=LABELS).loss.backward()
        getattr(torch.optim, kind)(model.parameters(), lr=0.3, fused=True).step()
    assert tokens(pair[1]) == tokens(pair[0]) != before[0] == before[1]


def test_encoder_outputs_of_another_decoder(pair: Any) -> None:
    """K/V that came with encoder outputs are not used after the decoder was trained, nor by another model."""
    stock, ours = pair
    other = make_stock("t5-v1.1", seed=3)
    other.encoder.load_state_dict(stock.encoder.state_dict())
    theirs = TRTT5ForConditionalGeneration.from_model(copy.deepcopy(other), num_threads=1)
    outputs = [model.get_encoder()(**batch()) for model in (stock, ours)]
    request = {"attention_mask": batch()["attention_mask"], "max_new_tokens": 8}

    def made(model: Any, states: Any, **more: Any) -> list[list[int]]:
        return model.generate(encoder_outputs=copy.copy(states), **request, **more).tolist()  # type: ignore[no-any-return]

    for beams in (1, 3):
        assert made(theirs, outputs[1], num_beams=beams) == made(other, outputs[0], num_beams=beams)
    with torch.no_grad():
        for model in (stock, ours):
            for parameter in model.decoder.parameters():
                parameter.mul_(1.2)
    assert made(ours, outputs[1]) == made(stock, outputs[0])


def test_training_while_another_thread_generates(pair: Any) -> None:
    _, ours = pair
    streamer_waits, goes_on = threading.Event(), threading.Event()

    class Waiting:
        def put(self, value: torch.Tensor) -> None:
            streamer_waits.set()
            goes_on.wait(20)

        def end(self) -> None:
            pass

    thread = threading.Thread(
        target=tokens, args=(ours,), kwargs={"streamer": Waiting(), **{k: v[:1] for k, v in batch().items()}}
    )
    thread.start()
    streamer_waits.wait(20)
    try:
        ours.train()
        ours(**batch(), labels=LABELS).loss.backward()
        ours.eval()
        assert ours(**batch(), labels=LABELS).loss.requires_grad
    finally:
        goes_on.set()
        thread.join(20)


def test_code_of_the_users_is_called_in_generate(pair: Any) -> None:
    """An exchanged forward(), hooks on the model, prepare_inputs_for_generation: Transformers' loop calls them."""
    stock, ours = pair
    expected = tokens(stock)

    def negated(forward: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            out = forward(*arguments, **named)
            out.logits = -out.logits
            return out

        return run

    results = []
    for model in pair:
        model.forward = functools.wraps(model.forward)(negated(model.forward))
        results.append(tokens(model))
        del model.forward
    assert results[0] == results[1] != expected
    assert "forward()" in ours.last_generation_path.reason
    calls: list[int] = []
    handle = ours.register_forward_hook(lambda *_: calls.append(1))
    assert tokens(ours) == expected and len(calls) == 8
    handle.remove()
    assert tokens(ours) == expected and ours.last_generation_path.loop == "device"


def test_modes_and_dropout_of_modules(pair: Any) -> None:
    """What is set on a module counts for the stock twin's as well."""
    _, ours = pair
    ours.train()
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    assert len({float(ours(**batch(), labels=LABELS).loss.detach()) for _ in range(3)}) == 1
    ours.decoder.gradient_checkpointing = True
    assert ours.reference.decoder.gradient_checkpointing
    ours.encoder.eval()
    assert not ours.reference.encoder.training and ours.reference.decoder.training


def test_exchanged_after_sizes_were_read(pair: Any) -> None:
    """Training reads sizes without opening engines; what is exchanged after it counts."""
    stock, ours = pair
    for model in pair:
        model(**batch(), labels=LABELS, output_attentions=model is ours)
        model.set_output_embeddings(nn.Linear(64, 211, bias=False))
        with torch.no_grad():
            model.lm_head.weight.copy_(stock.shared.weight.flip(0))
    assert tokens(ours) == tokens(stock)


def test_deleted_models_are_freed_at_once() -> None:
    ours = TRTT5ForConditionalGeneration.from_model(make_stock("t5-v1.1", d_model=256, d_ff=512), num_threads=1)
    for more in ({}, {"num_beams": 3}, {"decoder_input_ids": LABELS}):
        tokens(ours, **more)
    gone = [weakref.ref(ours), weakref.ref(ours.session), *map(weakref.ref, ours.session._weights.values())]
    gc.collect()
    gc.disable()
    try:
        del ours
        assert not any(kept() is not None for kept in gone)
    finally:
        gc.enable()


class Adapter(nn.Module):
    """A linear module and a small product beside it, as LoRA adds one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.added = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden) + self.added(hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("warm", [True, False])
def test_exchanged_modules_are_refused(pair: Any, warm: bool) -> None:
    _, ours = pair
    if warm:
        tokens(ours)
        assert ours.reference is ours.reference
    attention = ours.encoder.block[0].layer[0].SelfAttention
    attention.q = Adapter(attention.q)
    for call in (lambda: tokens(ours), lambda: ours.reference, lambda: ours.train()(**batch(), labels=LABELS)):
        with pytest.raises(
            UnsupportedModelError, match=r"first 'encoder.block.0.layer.0.SelfAttention.q.*adapters of peft"
        ):
            call()
    attention.q = attention.q.base
    assert len(tokens(ours.eval())) == 3


def test_embeddings_that_differ_are_refused(tmp_path: Path) -> None:
    stock = make_stock("t5-v1.1")
    stock.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    for factor in (1, -1):
        state["decoder.embed_tokens.weight"] = state["shared.weight"].clone() * factor
        save_file(state, path, metadata={"format": "pt"})
        if factor == 1:
            assert tokens(TRTT5ForConditionalGeneration.from_pretrained(tmp_path, num_threads=1)) == tokens(stock)
            continue
        again = type(stock).from_pretrained(tmp_path, dtype=torch.float32)
        if not torch.equal(again.decoder.embed_tokens.weight, again.shared.weight):  # older Transformers tie them
            with pytest.raises(UnsupportedModelError, match=r"decoder.embed_tokens.weight has other values"):
                TRTT5ForConditionalGeneration.from_pretrained(tmp_path, num_threads=1)


def test_reference_generates_by_the_models_settings(pair: Any) -> None:
    stock, ours = pair
    inner = {"output_attentions": True, "return_dict_in_generate": True}
    for settings in ({"max_new_tokens": 5, "num_beams": 3}, {"max_new_tokens": 7, "no_repeat_ngram_size": 2}):
        for model in (stock, ours):
            model.generation_config = GenerationConfig(decoder_start_token_id=0, pad_token_id=0, **settings)
        inputs = batch()
        expected = stock.generate(**inputs)
        stock.set_attn_implementation("eager")
        assert ours.generate(**inputs, **inner).sequences.tolist() == expected.tolist()
        assert compare(ours, ours.reference, [inputs]).share == 1.0
        ours.generation_config.output_attentions = True
        out = ours.generate(
            **inputs, generation_config=GenerationConfig(max_new_tokens=5, return_dict_in_generate=True)
        )
        assert (out.decoder_attentions is not None) == (GenerationConfig().output_attentions is None)


@pytest.mark.parametrize("heads", [1, 4])
def test_boolean_masks_of_four_axes(pair: Any, heads: int) -> None:
    stock, ours = pair
    mask = batch()["attention_mask"].bool()[:, None, None].expand(-1, heads, -1, -1)
    ids = {"input_ids": batch()["input_ids"], "decoder_input_ids": LABELS}
    with torch.no_grad():
        expected = stock(**batch(), decoder_input_ids=LABELS).logits
        torch.testing.assert_close(ours(**ids, attention_mask=mask).logits, expected, atol=LOGITS_ATOL, rtol=1e-5)
        own = torch.ones(3, 1, 3, 3, dtype=torch.bool).tril()
        got = ours(**batch(), decoder_input_ids=LABELS, decoder_attention_mask=own).logits
        torch.testing.assert_close(got, expected, atol=LOGITS_ATOL, rtol=1e-5)


def test_static_cache_of_the_users(pair: Any) -> None:
    stock, ours = pair
    results = []
    for model in (stock, ours):
        cache = EncoderDecoderCache(
            StaticCache(config=model.config, max_cache_len=16), StaticCache(config=model.config, max_cache_len=11)
        )
        results.append(tokens(model, **{CACHE: cache}))
    assert results[0] == results[1]


def test_many_with_results_as_dictionaries() -> None:
    from transformers import AutoTokenizer

    ours, tokenizer = (
        TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, num_threads=1),
        AutoTokenizer.from_pretrained(SHIPPED),
    )
    texts = ["がっこう", "ねこ", "さくら"]
    expected = list(generate_many(ours, tokenizer, texts))
    ours.generation_config.return_dict_in_generate = True
    assert list(generate_many(ours, tokenizer, texts)) == expected and all(expected)
    assert compare(ours, ours.reference, texts).share == 1.0
    assert compare(ours, ours.reference, texts, do_sample=True, max_new_tokens=9).share == 1.0
    assert compare(ours, ours.reference, texts, num_beams=2, num_return_sequences=2).share == 1.0
    with pytest.raises(InputError, match="one string"):
        compare(ours, ours.reference, "abc", num_beams=2)
    with pytest.raises(InputError, match="one string"):
        TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, calibration="がっこう")


def test_gradients_outside_of_training_mode(pair: Any) -> None:
    stock, ours = pair
    for model in pair:
        model(**batch(), labels=LABELS).loss.backward()
    for (name, left), right in zip(stock.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad, atol=1e-4, rtol=1e-3, msg=name)
    for model in pair:
        states = model.get_encoder()(**batch()).last_hidden_state.detach().requires_grad_()
        model(
            encoder_outputs=(states,), attention_mask=batch()["attention_mask"], decoder_input_ids=LABELS
        ).logits.sum().backward()
        assert states.grad is not None
    with torch.no_grad():
        assert not ours(**batch(), labels=LABELS).loss.requires_grad
    strict = TRTT5ForConditionalGeneration.from_model(stock, num_threads=1, strict=True)
    with pytest.raises(StrictModeError, match=r"backward\(\)"):
        strict(**batch(), labels=LABELS).loss.backward()
    with pytest.raises(StrictModeError, match="training mode"):
        strict.train()(**batch(), labels=LABELS)


def test_dropout_without_gradients(pair: Any) -> None:
    """Monte Carlo dropout: training mode under no_grad."""
    _, ours = pair
    ours.train()
    with torch.no_grad():
        losses = {float(ours(**batch(), labels=LABELS).loss) for _ in range(3)}
    assert len(losses) == 3


def test_settings_of_the_config_as_arguments(tmp_path: Path) -> None:
    make_stock("t5-v1.1").save_pretrained(tmp_path)
    ours = TRTT5ForConditionalGeneration.from_pretrained(
        tmp_path, dropout_rate=0.25, use_cache=False, decoder_start_token_id=5, num_threads=1
    )
    assert (ours.config.dropout_rate, ours.config.use_cache, ours.config.decoder_start_token_id) == (0.25, False, 5)
    assert ours.generation_config.decoder_start_token_id == 5
    assert TRTT5ForConditionalGeneration.from_pretrained(tmp_path, config=str(tmp_path)).config.d_model == 64
    with pytest.raises(InputError, match=r"not known.*dropuot_rate"):
        TRTT5ForConditionalGeneration.from_pretrained(tmp_path, dropuot_rate=0.2)
    with pytest.raises(InputError, match="got None"):
        TRTT5ForConditionalGeneration.from_pretrained(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [None, "a name", torch.compile(nn.Linear(1, 1), backend="eager")])
def test_from_model_of_something_else(wrong: Any) -> None:
    with pytest.raises(InputError, match="expected a Transformers model"):
        TRTT5ForConditionalGeneration.from_model(wrong)
    with pytest.raises(UnsupportedModelError, match="tensors are not those of TRTT5Encoder"):
        TRTT5EncoderModel.from_model(make_stock("t5-v1.1"))


class Derived(TRTT5ForConditionalGeneration):
    """A user's own class."""

    def shout(self) -> str:
        return "x"


def test_classes_derived_from_ours(tmp_path: Path) -> None:
    stock = make_stock("mt5")
    stock.save_pretrained(tmp_path)
    made = [
        Derived.from_pretrained(tmp_path, num_threads=1),
        Derived.from_model(stock, num_threads=1),
        Derived(stock.config),
    ]
    for ours in made:
        assert isinstance(ours, Derived) and isinstance(ours, type(stock)) and ours.shout() == "x"
    assert type(made[0]) is type(made[2]) and type(made[0]).__name__ == "Derived"
    again = [pickle.loads(pickle.dumps(made[0])), copy.deepcopy(made[0])]
    for ours in (*made[:2], *again):
        assert isinstance(ours, Derived) and tokens(ours) == tokens(stock)
    assert isinstance(made[2].generate(**REQUEST), torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("engine", ["onnxruntime", "stand-in"])
def test_other_default_dtypes(pair: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, engine: str) -> None:
    stock, ours = pair
    if engine == "stand-in":
        ours._session = stand_in_session(ours, monkeypatch)
    arguments: tuple[dict[str, Any], ...] = ({}, {"num_beams": 3}, {"decoder_input_ids": LABELS, "max_new_tokens": 4})
    expected = [tokens(stock, **more) for more in arguments]
    torch.set_default_dtype(dtype)
    try:
        assert [tokens(ours, **more) for more in arguments] == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("factor", [2, 3, 4.1, 1e6])
@pytest.mark.parametrize("engine", ["onnxruntime", "stand-in"])
def test_penalties_that_grow_beyond_numbers(
    pair: Any, monkeypatch: pytest.MonkeyPatch, factor: float, engine: str
) -> None:
    """For lengths that are never reached: ours looks at all of them beforehand."""
    stock, ours = pair
    if engine == "stand-in":
        ours._session = stand_in_session(ours, monkeypatch)
    more = {"exponential_decay_length_penalty": (3, factor), "max_new_tokens": 6}
    assert tokens(ours, **more) == tokens(stock, **more)


def test_early_stopping_that_equals_true(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, ours = pair
    ours._session = stand_in_session(ours, monkeypatch)
    request = {**batch(4, 9, seed=0), "num_beams": 3, "max_new_tokens": 40, "length_penalty": 2.0}
    ends = [1, 8, 27, 34, 67, 69, 82, 88, 107, 122, 184, 189, 192, 199, 205]
    for early in (1, True, 1, False):
        more = {"early_stopping": early, "eos_token_id": ends, "pad_token_id": 3}
        assert tokens(ours, **request, **more) == tokens(stock, **request, **more)


def test_forward_while_a_request_moves_on_to_a_larger_cache(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another thread does at that moment must not get the buffers that are still being read."""
    stock, ours = pair
    ours._session = stand_in_session(ours, monkeypatch)
    request = {"max_new_tokens": 131, "min_new_tokens": 131}
    take_in, busy = step_buffers.Slot.take_in, []

    def meanwhile(slot: Any, state: Any, mask_value: float) -> None:
        if state.length >= 128 and not busy:
            busy.append(1)
            ours(**batch(seed=9), decoder_input_ids=torch.full((3, 1), 7))
        take_in(slot, state, mask_value)

    monkeypatch.setattr(step_buffers.Slot, "take_in", meanwhile)
    assert tokens(ours, **request) == tokens(stock, **request) and busy


def test_request_inside_of_a_streamer(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded choice keeps numbers of its own."""
    stock, ours = pair
    ours._session = stand_in_session(ours, monkeypatch)
    tokens(ours, **batch(3, 9), max_new_tokens=140, repetition_penalty=1.3)
    prompt = torch.randint(2, 200, (3, 131), generator=torch.Generator().manual_seed(1))

    class Nested:
        def __init__(self, model: Any) -> None:
            self.model, self.seen = model, 0

        def put(self, value: torch.Tensor) -> None:
            self.seen += 1
            if self.seen == 3:
                inner = {**batch(3, 9, seed=2), "decoder_input_ids": prompt, "repetition_penalty": 0.7}
                tokens(self.model, **inner, max_new_tokens=10)

        def end(self) -> None:
            pass

    outer = {**batch(3, 9), "max_new_tokens": 30, "repetition_penalty": 1.9}
    expected = tokens(stock, **outer)
    assert tokens(ours, **outer, streamer=Nested(ours)) == expected
