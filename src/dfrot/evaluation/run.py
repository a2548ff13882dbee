"""Load, measure, record."""

import time
from collections.abc import Sequence

from dfrot.checkpoint.load import checkpoint_recipe, load
from dfrot.errors import UserError
from dfrot.evaluation.perplexity import perplexity
from dfrot.models.source import locate
from dfrot.results import Record, conditions, model_size
from dfrot.texts import read_text, text_label, token_blocks


def evaluate(
    model: str,
    texts: Sequence[str],
    *,
    seq_len: int = 2048,
    max_tokens: int | None = None,
    device: str = "cpu",
) -> Record:
    """Perplexity of a model or checkpoint on each of the texts.

    Args:
        texts: wikitext2, c4, pydoc, or paths.
        seq_len: tokens of one block.
        max_tokens: take the first ⌊max_tokens / seq_len⌋ blocks of each text.

    Raises:
        UserError: model, text or lengths do not fit.
        EnvironmentFault: model or text has to come from the hub, which cannot be reached.
    """
    if not texts:
        raise UserError("no text was given to measure perplexity on.")
    if len({text_label(text) for text in texts}) < len(texts):
        raise UserError(f"results name a text after its file, so the names must differ; got {', '.join(texts)}.")
    path = locate(model)
    contents = {text: read_text(text, "test") for text in texts}
    loaded, tokenizer = load(model, device=device)
    blocks = {text: token_blocks(tokenizer, content, text, seq_len, max_tokens) for text, content in contents.items()}
    started = time.perf_counter()
    metrics = {f"ppl/{text_label(text)}": perplexity(loaded, blocks[text], text_label(text)) for text in texts}
    recipe = checkpoint_recipe(path)
    return Record(
        model=model,
        recipe=None if recipe is None else recipe.to_json(),
        metrics=metrics,
        size=model_size(path),
        timings_s={"evaluate": time.perf_counter() - started},
        conditions=conditions(
            loaded,
            text=", ".join(map(text_label, texts)),
            seq_len=seq_len,
            tokens={text_label(text): blocks[text].numel() for text in texts},
            seed=None if recipe is None else recipe.seed,
        ),
    )
