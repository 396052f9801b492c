"""The plugin's entry point: says what it offers and imports nothing heavy."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from emloc.plugin import (
    IN_FEW_BITS,
    TRANSFORMER_BLOCKS,
    TRANSFORMERS_MODEL,
    Interrupted,
    MethodEntry,
    hookimpl,
)

if TYPE_CHECKING:
    import typer


@hookimpl
def emloc_register_methods() -> Sequence[MethodEntry]:
    """The methods that EMLoC is compared with."""
    return [
        MethodEntry(
            "lora",
            "LoRA on the base model, as a reference",
            "emloc_baselines.lora:Lora",
            uses_budget=False,
        ),
        MethodEntry(
            "qlora",
            "LoRA trained on the base in NF4, used on the original weights",
            "emloc_baselines.qlora:Qlora",
            needs=(IN_FEW_BITS,),
            uses_budget=False,
        ),
        MethodEntry(
            "loram-rand",
            "LoRA on a model with random heads and neurons pruned, scattered back",
            "emloc_baselines.loram:LoramRand",
            needs=(TRANSFORMERS_MODEL, TRANSFORMER_BLOCKS),
        ),
        MethodEntry(
            "loram-stru",
            "the same with the least important ones pruned, to first order",
            "emloc_baselines.loram:LoramStru",
            needs=(TRANSFORMERS_MODEL, TRANSFORMER_BLOCKS),
        ),
        MethodEntry(
            "offsite-tuning",
            "LoRA in the first and last blocks around a thinned middle",
            "emloc_baselines.offsite:OffsiteTuning",
            needs=(TRANSFORMERS_MODEL, TRANSFORMER_BLOCKS),
        ),
        MethodEntry(
            "upop",
            "LoRA on a model with head dimensions and neurons pruned by closing masks, scattered back",
            "emloc_baselines.upop:Upop",
            needs=(TRANSFORMERS_MODEL, TRANSFORMER_BLOCKS),
        ),
        MethodEntry(
            "smaller-model",
            "LoRA on a smaller model of the same kind, used on that model",
            "emloc_baselines.smaller:SmallerModel",
            uses_budget=False,
        ),
        MethodEntry(
            "svd",
            "EMLoC with an emulator made by plain SVD, without calibration",
            "emloc_baselines.plain_svd:PlainSvd",
            needs=(TRANSFORMERS_MODEL,),
        ),
        MethodEntry(
            "svd-uncorrected",
            "the same without correction",
            "emloc_baselines.plain_svd:PlainSvdUncorrected",
            needs=(TRANSFORMERS_MODEL,),
            trains_as="svd",
        ),
    ]


@hookimpl
def emloc_register_commands(app: "typer.Typer") -> None:
    """`emloc bench`."""
    import typer

    @app.command("bench")
    def bench(  # pyright: ignore[reportUnusedFunction]
        config: Annotated[
            Path, typer.Argument(help="YAML file: methods, budgets, seeds, data sets")
        ],
        overrides: Annotated[
            list[str] | None, typer.Argument(help="key=value or section.key=value, …")
        ] = None,
    ) -> None:
        """Compare methods on the same data, budget and seeds; finished cells are not run again."""
        from emloc_baselines.bench.harness import run_bench

        try:
            print(run_bench(config, *(overrides or [])))
        except KeyboardInterrupt as problem:
            raise Interrupted(
                "Interrupted; finished cells are kept, and the same command continues with the others."
            ) from problem
