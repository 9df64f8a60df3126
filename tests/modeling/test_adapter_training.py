"""Training with adapters: gradients are those of the Hugging Face class, and Seq2SeqTrainer trains and predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from tests.adapters import BATCH, CONFIGS, LABELS, QUIET, compare, lora, peft_pair, tokens
from tests.tiny_models import make_hugging_face

pytestmark = QUIET


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**BATCH, labels=LABELS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("adapter", list(CONFIGS))
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_adapters_are_those_of_the_hugging_face_class(adapter: str, training: bool) -> None:
    theirs, mine, _ = peft_pair(make_hugging_face("t5-v1.1"), {"default": CONFIGS[adapter]})
    wanted, found = (gradients(model.train(training)) for model in (theirs, mine))
    assert wanted.keys() == found.keys() and len(wanted) > 4
    if not training:  # no dropout: nothing is drawn
        for name, gradient in wanted.items():
            assert torch.allclose(gradient, found[name], rtol=1e-3, atol=1e-5), name


def test_losses_on_logits_of_engines_reach_adapters() -> None:
    theirs, mine, _ = peft_pair(make_hugging_face("t5-v1.0"), {"default": lora()})
    for model in (theirs, mine):
        model(**BATCH, decoder_input_ids=LABELS).logits.float().square().mean().backward()
    pairs = zip(theirs.named_parameters(), mine.named_parameters(), strict=True)
    for (name, wanted), (_, found) in pairs:
        assert (wanted.grad is None) == (found.grad is None), name
        assert wanted.grad is None or torch.allclose(wanted.grad, found.grad, rtol=1e-3, atol=1e-4), name


def test_seq2seq_trainer_trains_and_predicts_as_with_the_hugging_face_class(tmp_path: Path) -> None:
    models = peft_pair(make_hugging_face("t5-v1.0", dropout_rate=0.0), {"default": lora()})
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": labels}
        for ids, mask, labels in zip(BATCH["input_ids"], BATCH["attention_mask"], LABELS, strict=True)
    ]
    results = []
    before = tokens(models[1])
    for name, model in zip(("theirs", "mine"), models[:2], strict=True):
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(tmp_path / name), max_steps=3, learning_rate=0.05, per_device_train_batch_size=3,
            predict_with_generate=True, generation_max_length=8, report_to=[], use_cpu=True, save_strategy="no", seed=1,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        loss = trainer.train().training_loss
        results.append((loss, trainer.predict(rows).predictions.tolist()))  # type: ignore[arg-type, union-attr]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert results[0][1] == results[1][1]
    compare(models[0].eval(), models[1].eval())
    assert tokens(models[1]) != before
