import re
import string
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emloc.errors import DataError
from emloc_vlm.scoring import (
    METRICS,
    best,
    chosen_option,
    exact,
    multiple_choice,
    normalise,
    occurs,
    squad_normalise,
    token_f1,
    token_recall,
    vqa_accuracy,
    vqa_normalise,
)

# Text that reaches the rules: words they know, numbers, punctuation, other scripts.
WORDS = [
    "a", "the", "A", "lung", "Lungs", "two", "none", "dont", "couldntve", "he'dve", "1,000", "3.5", "é",
    "e\u0301", "Ｂ", "チパ", "…", "İ", "ß", "。",
]  # fmt: skip
PIECES = st.sampled_from([*WORDS, *string.punctuation, " ", "  ", "\n", "\t"])
TEXTS = st.lists(PIECES, max_size=8).map("".join) | st.text(max_size=12)
OPTIONS = {"A": "Cyst", "B": "Large mass", "C": "Lungs", "D": "Heart"}


def leave_one_out(agrees: list[bool]) -> Fraction:
    """VQA's accuracy as the definition says it: all subsets of all but one, one after the other."""
    scores = [
        min(Fraction(1), Fraction(sum(agrees[:left_out] + agrees[left_out + 1 :]), 3))
        for left_out in range(len(agrees))
    ]
    return sum(scores, Fraction()) / len(scores)


@given(st.lists(st.booleans(), min_size=2, max_size=12))
def test_vqa_accuracy_is_the_mean_over_all_who_may_be_left_out(agrees: list[bool]):
    references = ["red" if agree else f"other {index}" for index, agree in enumerate(agrees)]
    assert vqa_accuracy(references, "Red.") == pytest.approx(float(leave_one_out(agrees)))


@pytest.mark.parametrize(
    ("agreeing", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_vqa_accuracy_of_ten_people(agreeing: int, score: float):
    references = ["2"] * agreeing + ["many"] * (10 - agreeing)
    assert vqa_accuracy(references, "two") == pytest.approx(score)


def test_vqa_accuracy_with_a_single_reference_is_exact():
    assert vqa_accuracy(["The left lung."], "left lung") == 1
    assert vqa_accuracy(["left lung"], "lung") == 0
    assert vqa_accuracy([], "lung") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The dog!", "dog"),
        ("1,000", "1000"),
        ("1,000 dogs, or so", "1000 dogs or so"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("black/white", "black white"),
        ("x-ray", "x ray"),
        ("x- ray", "x ray"),
        ("3.5 mm.", "3.5 mm"),
        ("St. Louis", "st louis"),
        ("p.m.", "pm"),
        ("Two", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("twas", "'twas"),
        ("its", "its"),
        ("wed", "wed"),
        ("somebody'd", "somebodyd"),
        ("yes\nand\tno", "yes and no"),
        ("$5: 10%", "$5: 10%"),
        ("a an the", ""),
        ("", ""),
        ("ÉCOLE", "école"),
    ],
)
def test_vqa_normalise(text: str, expected: str):
    assert vqa_normalise(text) == expected


@given(TEXTS)
@example("1,000 . a-n")
@example("…")
def test_normalising_twice_changes_nothing(text: str):
    for normalised in (normalise, squad_normalise, vqa_normalise):
        assert normalised(normalised(text)) == normalised(text)


def test_exact_ignores_case_width_spaces_and_a_final_full_stop():
    assert exact(" Café  au lait", "cafe\u0301 AU lait.") == 1
    assert exact("１２", "12") == 1
    assert exact("チパ", "チパ。") == 1
    assert exact("-5", "5") == 0
    assert exact("190.7", "1907") == 0
    assert exact("yes", "") == 0


def squad_f1(reference: str, prediction: str) -> float:
    """From precision and recall, on words found in another way than the module finds them."""

    def words(text: str) -> Counter[str]:
        kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return Counter(re.sub(r"\b(?:a|an|the)\b", " ", kept).split())

    wanted, found = words(reference), words(prediction)
    if not wanted or not found:
        return float(not wanted and not found)
    shared = sum(min(wanted[word], found[word]) for word in wanted)
    if not shared:
        return 0.0
    precision, recall = shared / sum(found.values()), shared / sum(wanted.values())
    return 2 * precision * recall / (precision + recall)


@given(TEXTS, TEXTS)
@example("20 MPG", "20 mpg, the best")
@example("the", "a")
@example("lung lung heart", "lung")
def test_token_f1(reference: str, prediction: str):
    assert token_f1(reference, prediction) == pytest.approx(squad_f1(reference, prediction))
    assert token_f1(reference, prediction) == token_f1(prediction, reference)
    assert token_f1(reference, reference) == 1


@given(TEXTS, TEXTS)
def test_scores_are_between_0_and_1_and_full_for_the_reference_itself(a: str, b: str):
    for score in (exact, token_f1, token_recall, occurs):
        assert 0 <= score(a, b) <= 1
    assert exact(a, a) == token_recall(a, a) == vqa_accuracy([a] * 10, a) == 1
    # Whole agreement is the most that there is.
    assert token_f1(a, b) >= (squad_normalise(a) == squad_normalise(b))


def test_token_recall_counts_what_of_the_reference_is_said():
    assert token_recall("left lower lobe", "It is the left lobe of the lung.") == pytest.approx(
        2 / 3
    )
    assert token_recall("left lung", "left left left") == 0.5
    assert token_recall("1,000", "about 1000") == 1
    assert token_recall("lung", "") == 0
    assert token_recall("the", "lung") == 0
    assert token_recall("the", "") == 1


def test_a_reference_occurs_within_a_sentence():
    assert occurs("Kenchin-jiru", "This is kenchin-jiru, a soup.") == 1
    assert occurs("けんちん汁", "これはけんちん汁です。") == 1
    assert occurs("", "anything") == 0


def test_the_best_of_several_references_counts():
    assert best(exact, ["Korea", "한국"], "한국") == 1
    assert best(exact, [], "한국") == 0


@pytest.mark.parametrize(
    "prediction",
    [
        "B", "b", "(B)", "B.", "**B**", " B\n", "B)", "Ｂ", "B: Large mass", "B. A large mass", "B - mass",
        "B, because of its size", "B Large mass", "The answer is B.", "The answer is B because of it",
        "Answer: (B) large mass", "Answer:\nB", "The correct option is B", "the answer is: option b.",
        "I would take option B here", "I think it is B.", "It's B", "Large mass", "large mass.",
        "A large mass", "The answer is a large mass", "Answer: A large mass", "It shows a large mass.",
        "It is a large mass (B)", "B. The heart is normal", "Option A is wrong. The answer is B.",
        "Let me see.\nB) it is",
    ],
)  # fmt: skip
def test_chosen_option_in_the_forms_that_models_answer_in(prediction: str):
    assert chosen_option(prediction, OPTIONS) == "B"
    assert multiple_choice(["B"], prediction, OPTIONS) == 1
    assert multiple_choice(["large mass"], prediction, OPTIONS) == 1
    assert multiple_choice(["D"], prediction, OPTIONS) == 0


@pytest.mark.parametrize(
    "prediction",
    [
        "", " ", "...", "A or B", "A, B and C", "A, B", "A) or B)", "B/C", "A\nB", "both A and B",
        "The answer is B or C", "Answer: B, C", "Option A or option B", "A: Cyst\nB: Large mass",
        "A large effusion", "The answer is a large effusion", "The answer is A large effusion", "B-cell",
        "The answer is B-cell lymphoma", "A's", "E", "a heart and lungs", "I do not know", "no idea (A) (B)",
    ],
)  # fmt: skip
def test_no_option_is_chosen(prediction: str):
    assert chosen_option(prediction, OPTIONS) is None
    assert multiple_choice(["A"], prediction, OPTIONS) == 0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("2", "2"), ("2. Korea", "2"), ("The answer is 5.", "5"), ("number 5", "5"), ("korea", "2"),
        ("これはチパです", "4"), ("Stuffed eggplant", "5"), ("It is stuffed eggplant rolls", "6"),
        ("Hong Kong", None), ("10", None), ("3.5", None), ("1,000", None), ("(1,2,3)", None),
    ],
)  # fmt: skip
def test_options_with_numbers_and_in_other_scripts(prediction: str, expected: str | None):
    options = dict(zip("123456", ["Hong Kong", "Korea", "Hong Kong", "チパ", "Stuffed eggplant"]))
    options["6"] = "Stuffed eggplant rolls"
    assert chosen_option(prediction, options) == expected


def test_the_key_goes_before_texts_that_look_like_keys():
    assert chosen_option("A", {"A": "B", "B": "A"}) == "A"
    assert chosen_option("3", {"A": "3", "B": "4"}) == "A"
    assert chosen_option("B: 3", {"A": "3", "B": "4"}) == "B"


@given(TEXTS, st.dictionaries(st.sampled_from("ABCDE"), TEXTS, max_size=5))
def test_chosen_option_is_an_option_or_none(prediction: str, options: dict[str, str]):
    assert chosen_option(prediction, options) in {None, *options}


@given(st.dictionaries(st.sampled_from("ABCDE"), TEXTS, min_size=1, max_size=5), st.data())
def test_a_bare_or_bracketed_key_is_always_understood(options: dict[str, str], data: st.DataObject):
    key = data.draw(st.sampled_from(sorted(options)))
    for form in ("{}", "({})", "{}.", " {}\n", "[{}]"):
        assert chosen_option(form.format(key), options) == key


def test_a_reference_that_is_no_option_is_refused():
    with pytest.raises(DataError, match="'kidney' is none of the options A, B, C, D"):
        multiple_choice(["kidney"], "B", OPTIONS)


def scores(metric: str, **row: object) -> dict[str, float]:
    return METRICS[metric].score(row)


def test_exact_match_is_among_the_scores_and_the_means_of_every_metric():
    assert set(METRICS) == {
        "exact_match", "vqa_accuracy", "multiple_choice", "websrc", "worldcuisines", "vqa_rad",
    }  # fmt: skip
    for metric in METRICS.values():
        for reference in ("B", ["B", "C"]):
            found = metric.score({"prediction": "B", "reference": reference})
            assert found["exact_match"] == 1
            assert metric.aggregate([found])["exact_match"] == 1
        assert metric.aggregate([]) == {"exact_match": None, "exact_match_count": 0}


def test_vqa_metric():
    row = {"reference": ["red"] * 2 + ["blue"] * 8, "prediction": "Red"}
    assert scores("vqa_accuracy", **row) == {
        "vqa_accuracy": pytest.approx(0.6),
        "exact_match": 1,
    }


def test_multiple_choice_metric():
    row = {"reference": "B", "options": OPTIONS}
    assert scores("multiple_choice", prediction="A large mass", **row)["exact_match"] == 1
    unclear = scores("multiple_choice", prediction="A or B", **row)
    assert unclear == {"exact_match": 0, "answered": 0}
    assert (
        scores("multiple_choice", prediction="(c)", reference="C", options={})["exact_match"] == 1
    )
    assert (
        scores("multiple_choice", prediction="2.", reference="2", options=None)["exact_match"] == 1
    )


def test_websrc_metric():
    found = scores("websrc", reference='190.7 "', prediction="the 190.7 inches")
    assert found == {"exact_match": 0, "f1": pytest.approx(2 / 3)}
    assert scores("websrc", reference='190.7 "', prediction="190.7") == {"exact_match": 1, "f1": 1}
    assert scores("websrc", reference='"', prediction="") == {"exact_match": 1, "f1": 1}
    assert scores("websrc", reference=["20 MPG", "20 mpg city"], prediction="20 mpg")["f1"] == 1


def test_worldcuisines_metric():
    options = {"1": "Okpa", "2": "Moin moin"}
    found = scores("worldcuisines", reference="2", prediction="Moin moin", options=options)
    assert found == {"exact_match": 1, "multiple_choice_accuracy": 1}
    found = scores(
        "worldcuisines", reference=["Pavê", "Pave"], prediction="It is PAVÊ.", options={}
    )
    assert found == {"exact_match": 0, "open_accuracy": 1}


def test_vqa_rad_metric_reports_closed_and_open_questions_apart():
    answered = [
        {"reference": "Yes", "prediction": "yes.", "kind": "closed"},
        {"reference": "No", "prediction": "Yes, there is", "kind": "closed"},
        {"reference": "left lung", "prediction": "the left side", "kind": "open"},
        {"reference": "no", "prediction": "no", "kind": None},
        {"reference": "liver", "prediction": "Liver"},
    ]
    metric = METRICS["vqa_rad"]
    assert metric.aggregate([metric.score(row) for row in answered]) == {
        "exact_match": pytest.approx(3 / 5),
        "exact_match_count": 5,
        "closed_accuracy": pytest.approx(2 / 3),
        "closed_accuracy_count": 3,
        "open_exact_match": 0.5,
        "open_exact_match_count": 2,
        "open_recall": 0.75,
        "open_recall_count": 2,
    }


@pytest.mark.parametrize(
    ("prediction", "chosen"),
    [
        ("-3", None), ("It is -3.", None), ("1.5", None), ("3,5", None), ("12.5 cm", None),
        ("3/4", None), ("12:30", None), ("=-3", None), ("there are 3.", "A"), ("x=3", "A"),
        ("it is 12,", "C"), ("12.", "C"), ("1/2", "D"), ("It is 1/2.", "D"),
    ],
)  # fmt: skip
def test_a_number_is_no_part_of_another(prediction: str, chosen: str | None):
    options = {"A": "3", "B": "5", "C": "12", "D": "1/2"}
    assert chosen_option(prediction, options) == chosen


@pytest.mark.parametrize(
    ("prediction", "chosen"),
    [("3:30", None), ("Answer: 3:30", None), ("The answer is 3%", None), ("3/4", None),
     ("The answer is 2 because", "2"), ("3. plum", "3"), ("2: pear", "2"), ("(3)", "3")],
)  # fmt: skip
def test_a_key_is_no_part_of_a_number(prediction: str, chosen: str | None):
    assert chosen_option(prediction, {"1": "apple", "2": "pear", "3": "plum"}) == chosen


def test_signs_and_powers_count():
    assert exact("-3", "−3") == 1
    assert exact("3", "-3") == 0
    assert exact("102", "10²") == 0
    assert exact("m2", "m²") == 1


def test_an_article_alone_is_not_any_other():
    score = METRICS["vqa_rad"].score
    assert score({"reference": "A", "prediction": "the"})["exact_match"] == 0
    assert score({"reference": "A", "prediction": "a."})["exact_match"] == 1
