"""The ways to a LoRA of one model side by side: what each takes, how long, and what is known of its worth.

Worth is the share of LoRA's gain that a way recovers on the original. It was measured on SmolLM2-135M and
GSM8K (`tools/records/formats.md`, `tools/records/streamed.md`), so it orders the ways of one model, and
promises nothing of another. Time is estimated where the device's speed is known (`emloc.planning.rates`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from emloc.options.compress import AUTO, LOW_RANK_FORMAT
from emloc.planning.ledger import StageMemory, total
from emloc.planning.qlora import BLOCK
from emloc.planning.rates import Rates
from emloc.planning.setting import POLISH_SAMPLES, Setting, Stages
from emloc.planning.training import step_seconds

GAINS: Mapping[str, Mapping[float, float]] = {
    AUTO: {2.35: 0.95, 3.2: 0.98, 4.2: 0.99},
    LOW_RANK_FORMAT: {6.4: 0.53, 9.6: 0.82},
}
"""Shares of LoRA's gain by format and bits per weight, the means of up to three seeds."""

QLORA_GAIN = 0.88

POLISHED: Mapping[str, Mapping[float, float]] = {AUTO: {2.35: 0.99}}
"""The same after polish; of more bits no less."""

EMULATOR = "emulator"

CLOSE = 0.02
"""Differences in gain that one seed does not tell apart."""


@dataclass(frozen=True)
class Room:
    """Memory and disk that there are to work with; None: any amount.

    Attributes:
        memory: bytes of the device.
        ram: bytes of the machine's memory beside a GPU.
        disk: bytes that may be written.
    """

    memory: int | None = None
    ram: int | None = None
    disk: int | None = None


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        memory: the most that its stages take.
        seconds: of a step; None where that is not known.
        gain: the share of LoRA's gain that it recovered; None where it was not measured.
    """

    name: str
    memory: StageMemory
    seconds: float | None
    gain: float | None

    def fits(self, room: Room) -> bool:
        """Return whether there is room for it."""
        places = {"device": room.memory, "host": room.ram, "disk": room.disk}
        return all(
            there is None or total(self.memory.lines(p)) <= there for p, there in places.items()
        )


def ways_of(setting: Setting, stages: Stages, rates: Rates | None) -> Sequence[Way]:
    """All ways, those on the base first."""
    beside = setting.beside
    base, streamed, emulated = _seconds(setting, rates)
    trained = [setting.stage(each) for each in stages.values()]
    emulator = max(trained, key=lambda stage: total(stage.device), default=StageMemory())
    polished = max(emulator, setting.stage(Setting.polish), key=lambda each: total(each.device))
    bits, kind = setting.bits_per_weight, setting.options.format
    return [
        Way("LoRA on the base", beside["LoRA on the base"], base, 1.0),
        Way("streamed LoRA on the base", beside["streamed LoRA on the base"], streamed, 1.0),
        Way(
            "QLoRA on the base",
            beside["QLoRA on the base"],
            _decoding(setting, base, rates),
            QLORA_GAIN,
        ),
        Way(EMULATOR, emulator, emulated, known_gain(kind, bits)),
        Way(f"{EMULATOR}, then polish", polished, emulated, known_gain(kind, bits, POLISHED)),
    ]


def known_gain(
    kind: str, bits: float, gains: Mapping[str, Mapping[float, float]] = GAINS
) -> float | None:
    """The share of LoRA's gain of a format, between the sizes that were measured, and no further."""
    known = gains.get(kind, {})
    sizes = sorted(known)
    if not sizes or bits < sizes[0] - 0.1:
        return None
    for low, high in pairwise(sizes):
        if bits <= high:
            share = min(1.0, max(0.0, (bits - low) / (high - low)))
            return known[low] + share * (known[high] - known[low])
    return known[sizes[-1]]


def recommended(ways: Sequence[Way], room: Room) -> tuple[Way, str] | None:
    """The way to take, with the reason; None where nothing fits."""
    fitting = [way for way in ways if way.fits(room)]
    if not fitting:
        return None
    if fitting[0].name == "LoRA on the base":
        return fitting[0], "it fits as it is, is exact, and needs no emulator"
    known = [way for way in fitting if way.gain is not None]
    best = max((way.gain or 0.0 for way in known), default=0.0)
    close = [way for way in known if (way.gain or 0.0) >= best - CLOSE]
    timed = [way for way in known if way.seconds is not None]
    if len(timed) < len(known):
        emulators = [way for way in close if way.name.startswith(EMULATOR)]
        chosen = (emulators or close or fitting)[0]
        return chosen, (
            f"it recovered {_percent(chosen.gain)} of LoRA's gain where it was measured; how long each takes "
            f"is not known here (--measure)"
        )
    quick = min(timed, key=lambda way: way.seconds or 0.0)
    chosen = min(close, key=lambda way: way.seconds or 0.0)
    times = (chosen.seconds or 0.0) / max(1e-9, quick.seconds or 0.0)
    than = "" if chosen is quick else f", and takes {times:.1f} times as long as {quick.name}"
    return chosen, (
        f"of those that fit, it recovers the most of LoRA's gain, {_percent(chosen.gain)} where it was "
        f"measured{than}"
    )


def as_json(
    ways: Sequence[Way], room: Room, setting: Setting, samples: int | None
) -> dict[str, Any]:
    """`ways` and `recommended`, as the plan has them.

    Args:
        samples: of the data set, for an epoch; None where they are not counted.
    """
    options = setting.options
    a_step = options.per_device_train_batch_size * options.gradient_accumulation_steps
    steps = None if samples is None else -(-samples // a_step)
    best = recommended(ways, room) if room.memory is not None else None
    return {
        "ways": [
            {
                "name": way.name,
                **{f"{p}_bytes": total(way.memory.lines(p)) for p in ("device", "host", "disk")},
                "fits": None if room.memory is None else way.fits(room),
                "seconds_per_step": way.seconds,
                "seconds_per_epoch": None
                if way.seconds is None or steps is None
                else steps * way.seconds,
                "gain_recovered": way.gain,
            }
            for way in ways
        ],
        "polish_samples": POLISH_SAMPLES,
        "recommended": None if best is None else {"way": best[0].name, "reason": best[1]},
    }


def _seconds(
    setting: Setting, rates: Rates | None
) -> tuple[float | None, float | None, float | None]:
    """Seconds of a step on the base, on the base streamed, and on the emulator."""
    if rates is None:
        return None, None, None
    subject, options = setting.subject, setting.options
    base = step_seconds(subject, (), options, (), rates)
    twice = options.model_copy(update={"gradient_checkpointing": True})
    streamed = step_seconds(subject, (), twice, (), rates)
    if streamed is not None and options.stream_from == "disk":
        streamed = max(streamed, 2 * subject.bytes / rates.disk)  # read on a thread of its own
    emulator = setting.emulator
    return base, streamed, step_seconds(subject, emulator.groups, options, emulator.tables, rates)


def _decoding(setting: Setting, base: float | None, rates: Rates | None) -> float | None:
    """Seconds of a step of QLoRA: one on the base, with its layers decoded twice."""
    if base is None or rates is None:
        return None
    subject = setting.subject
    layers = [subject.shapes[name] for name in subject.inside if name in subject.shapes]
    numel = sum(rows * columns for rows, columns in layers)
    itemsize = subject.itemsize(setting.options.dtype)
    moved = numel * (itemsize + 0.5 + 1 / BLOCK)
    return base + 2 * setting.options.gradient_accumulation_steps * moved / rates.far


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None else f"{share:.0%}"
