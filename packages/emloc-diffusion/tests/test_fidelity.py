"""DreamBooth's scores: the arithmetic, the prompts, and all three scores of a subject."""

import math

import pytest
import torch
import torchvision_schemas  # noqa: F401  (before what may import torchvision)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_encoders import (
    picture,
)

from emloc.errors import (
    ConfigError,
    DataError,
    EmlocError,
    MismatchError,
)
from emloc_diffusion.scoring import (
    LIVE_PROMPTS,
    OBJECT_PROMPTS,
    FidelityScores,
    evaluation_prompts,
    load_clip,
    load_dino,
    plain_prompts,
    prompt_fidelity,
    score,
    subject_fidelity,
)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# ---- the arithmetic


def cosine(one, other):
    return math.fsum(a * b for a, b in zip(one, other)) / (math.hypot(*one) * math.hypot(*other))


def by_loops(first, second):
    pairs = [cosine(one, other) for one in first.tolist() for other in second.tolist()]
    return math.fsum(pairs) / len(pairs)


def row_by_row(first, second):
    pairs = [cosine(one, other) for one, other in zip(first.tolist(), second.tolist())]
    return math.fsum(pairs) / len(pairs)


ENTRIES = st.floats(-100, 100, allow_subnormal=False).map(lambda value: round(value, 3))


@st.composite
def vectors(draw, rows, width):
    row = st.lists(ENTRIES, min_size=width, max_size=width).filter(any)
    return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.float64)


@st.composite
def two_sets(draw, same_rows=False):
    width, n, m = (draw(st.integers(1, 6)) for _ in range(3))
    return draw(vectors(n, width)), draw(vectors(n if same_rows else m, width))


@given(two_sets())
def test_subject_fidelity_is_the_mean_of_all_pairs(sets):
    generated, real = sets
    found = subject_fidelity(generated, real)
    assert found == pytest.approx(by_loops(generated, real), abs=1e-12)
    assert subject_fidelity(real, generated) == pytest.approx(found, abs=1e-14)
    assert -1 <= found <= 1


@given(two_sets(same_rows=True))
def test_prompt_fidelity_is_the_mean_of_the_rows(sets):
    images, texts = sets
    found = prompt_fidelity(images, texts)
    assert found == pytest.approx(row_by_row(images, texts), abs=1e-12)
    assert -1 <= found <= 1


@given(two_sets(same_rows=True), st.sampled_from([1e-300, 1e-30, 3.0, 1e150, 1e300]))
def test_length_does_not_count(sets, factor):
    first, second = sets
    for fidelity in (subject_fidelity, prompt_fidelity):
        expected = fidelity(first, second)
        assert fidelity(first * factor, second) == pytest.approx(expected, abs=1e-12)
        assert fidelity(-first, second) == pytest.approx(-expected, abs=1e-12)


@given(two_sets())
def test_every_real_picture_counts_alike(sets):
    generated, real = sets
    each = [subject_fidelity(generated, row[None]) for row in real]
    assert subject_fidelity(generated, real) == pytest.approx(
        math.fsum(each) / len(each), abs=1e-12
    )


def test_a_picture_agrees_with_itself_exactly():
    one = torch.tensor([[0.1, 0.7, -0.3]])
    assert subject_fidelity(one, one) == pytest.approx(1, abs=1e-15)
    assert subject_fidelity(one, one) <= 1
    assert subject_fidelity(one, -one) >= -1
    assert subject_fidelity(torch.eye(3)[:1], torch.eye(3)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_summed_in_float64(dtype):
    generated, real = torch.randn(40, 384).to(dtype), torch.randn(7, 384).to(dtype)
    expected = by_loops(generated.double(), real.double())
    assert subject_fidelity(generated, real) == pytest.approx(expected, abs=1e-13)
    texts = torch.randn(40, 384).to(dtype)
    expected = row_by_row(generated.double(), texts.double())
    assert prompt_fidelity(generated, texts) == pytest.approx(expected, abs=1e-13)


def spoiled(value, row=1):
    matrix = torch.ones(3, 4)
    matrix[row, 2] = value
    return matrix


@pytest.mark.parametrize("fidelity", [subject_fidelity, prompt_fidelity])
@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (spoiled(float("nan")), DataError, "embedding 1 has NaN or infinity"),
        (spoiled(float("-inf"), row=2), DataError, "embedding 2 has NaN or infinity"),
        (torch.tensor([[1.0] * 4, [1.0] * 4, [0.0] * 4]), DataError, "embedding 2 is all zeros"),
        (torch.ones(0, 4), DataError, "at least one"),
        (torch.ones(3, 0), DataError, "at least one"),
        (torch.ones(4), MismatchError, "expected (how many, width)"),
        (torch.ones(1, 3, 4), MismatchError, "expected (how many, width)"),
        (torch.ones(3, 5), MismatchError, "5"),
    ],
)
def test_unusable_embeddings_are_refused(fidelity, bad, error, says):
    good = torch.ones(3, 4)
    for arguments in ((bad, good), (good, bad)):
        with pytest.raises(error) as caught:
            fidelity(*arguments)
        assert says in str(caught.value)
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, EmlocError)


def test_prompts_and_pictures_must_be_as_many():
    with pytest.raises(MismatchError, match="one text of the same encoder per image"):
        prompt_fidelity(torch.ones(3, 4), torch.ones(2, 4))


# ---- prompts


def test_there_are_25_prompts_for_things_and_for_live_subjects():
    for templates in (OBJECT_PROMPTS, LIVE_PROMPTS):
        assert len(templates) == len(set(templates)) == 25
        for template in templates:
            assert template.startswith("a ")
            assert template.count("{0} {1}") == 1
            assert template.replace("{0} {1}", "").count("{") == 0
    assert len(set(OBJECT_PROMPTS) & set(LIVE_PROMPTS)) == 15


def test_prompts_name_token_and_class():
    assert evaluation_prompts("sks", "dog", True)[10] == "a sks dog wearing a red hat"
    assert evaluation_prompts("sks", "vase", False)[12] == (
        "a sks vase with the Eiffel Tower in the background"
    )
    assert plain_prompts("stuffed animal", live=False)[-1] == "a cube shaped stuffed animal"


@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip), st.booleans())
def test_plain_prompts_are_the_same_without_the_token(token, noun, live):
    full, plain = evaluation_prompts(token, noun, live), plain_prompts(noun, live)
    assert len(full) == len(plain) == 25
    for template, with_token, without in zip(LIVE_PROMPTS if live else OBJECT_PROMPTS, full, plain):
        before, after = template.split("{0} {1}")
        assert with_token == f"{before}{token.strip()} {noun.strip()}{after}"
        assert without == f"{before}{noun.strip()}{after}"


def test_empty_words_are_refused():
    with pytest.raises(ConfigError, match="subject_token is empty"):
        evaluation_prompts(" ", "dog", True)
    for call in (lambda: evaluation_prompts("sks", "", True), lambda: plain_prompts(" ", False)):
        with pytest.raises(ConfigError, match="class_name is empty"):
            call()


# ---- all three scores


def test_scores_of_a_subject(dino_folder, clip_folder):
    dino, clip = load_dino(str(dino_folder)), load_clip(str(clip_folder))
    prompts = plain_prompts("dog", True)[:3]
    generated = [(prompts[seed % 3], picture(seed, (32, 32))) for seed in range(7)]
    real = [picture(seed, (50, 40)) for seed in range(20, 25)]
    found = score(generated, real, dino, clip)

    images = [image for _, image in generated]
    texts = clip.texts([text for text, _ in generated]).double()
    in_clip = clip.images(images).double()
    assert (found.generated_count, found.real_count) == (7, 5)
    assert found.dino == pytest.approx(
        by_loops(dino.images(images).double(), dino.images(real).double()), abs=1e-6
    )
    assert found.clip_i == pytest.approx(by_loops(in_clip, clip.images(real).double()), abs=1e-6)
    assert found.clip_t == pytest.approx(row_by_row(in_clip, texts), abs=1e-6)
    turned = [
        (text, image) for (text, _), (_, image) in zip(generated, generated[1:] + generated[:1])
    ]
    assert score(turned, real, dino, clip).clip_t != pytest.approx(found.clip_t, abs=1e-5)


class Table:
    """Looks embeddings up: pictures by width, texts by word count."""

    def images(self, images):
        return torch.stack([torch.eye(3)[image.width - 1] for image in images])

    def texts(self, texts):
        assert len(set(texts)) == len(texts)
        return torch.stack([torch.eye(3)[len(text.split()) - 1] for text in texts])


def test_each_picture_meets_its_own_prompt_and_all_real_pictures():
    one, two, three = (Image.new("RGB", (width, 1)) for width in (1, 2, 3))
    found = score(
        [("a", one), ("a b", two), ("a", three), ("a b", one)], [one, one, two, three],
        Table(), Table(),
    )  # fmt: skip
    same = [2, 1, 1, 2]  # real pictures with the embedding of each generated one
    assert found.dino == pytest.approx(sum(same) / 16)
    assert found.clip_i == found.dino
    assert found.clip_t == pytest.approx(2 / 4)
    assert found == FidelityScores(found.dino, found.clip_i, found.clip_t, 4, 4)


def test_nothing_to_score_is_refused():
    one = Image.new("RGB", (1, 1))
    with pytest.raises(DataError, match="no generated pictures"):
        score([], [one], Table(), Table())
    with pytest.raises(DataError, match="no real pictures"):
        score([("a", one)], [], Table(), Table())


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "a b", "a b c"]), st.integers(1, 3)), min_size=1, max_size=9
    )
)
def test_clip_t_counts_the_pictures_that_match(rows):
    generated = [(text, Image.new("RGB", (width, 1))) for text, width in rows]
    matching = sum(len(text.split()) == width for text, width in rows)
    found = score(generated, [Image.new("RGB", (1, 1))], Table(), Table())
    assert found.clip_t == pytest.approx(matching / len(rows))
