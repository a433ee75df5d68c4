"""The demo's task: fair to the model, and the same for everyone."""

import pytest

from edgeport.demo.triage import SPECIALTIES, Question, Split, accuracy_interval, questions


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_seed_decides_the_questions(split: Split) -> None:
    assert questions(split, 80, seed=3) == questions(split, 80, seed=3)
    assert questions(split, 80, seed=3) != questions(split, 80, seed=4)


def test_no_held_out_question_is_trained_on_under_any_seed() -> None:
    train = {question.prompt.lower() for seed in range(3) for question in questions("train", 2400, seed)}
    test = [question.prompt.lower() for seed in range(3) for question in questions("test", 400, seed)]
    assert train.isdisjoint(test)


@pytest.mark.filterwarnings("ignore:(open|read)_text is deprecated:DeprecationWarning")
def test_no_category_is_on_both_sides() -> None:
    import simple_icd_10_cm as icd  # type: ignore[import-untyped]

    category = {
        icd.get_description(code): code[:3]
        for chapter in SPECIALTIES
        for code in icd.get_descendants(chapter)
        if icd.is_leaf(code)
    }

    def categories(split: Split, count: int) -> set[str]:
        asked = questions(split, count)
        return {category[question.prompt.split("\n")[0].removeprefix("Diagnosis: ")] for question in asked}

    assert categories("train", 2400).isdisjoint(categories("test", 400))


@pytest.mark.parametrize(("count", "most"), [(400, 50), (75, 10)])
def test_specialties_are_balanced(count: int, most: int) -> None:
    answers = [question.answer for question in questions("test", count)]
    counts = {answers.count(answer) for answer in range(len(SPECIALTIES))}
    assert len(answers) == count
    assert max(counts) == most
    assert max(counts) - min(counts) <= 1


def test_questions_are_distinct_and_short() -> None:
    prompts = [question.prompt for question in questions("test", 400)]
    assert len(set(prompts)) == len(prompts)
    assert max(map(len, prompts)) < 130
    assert all(prompt.startswith("Diagnosis: ") and prompt.endswith("Department:") for prompt in prompts)


def test_options_differ_early_and_continue_the_prompt() -> None:
    assert all(option.startswith(" ") for option in SPECIALTIES.values())
    assert len({option[:5] for option in SPECIALTIES.values()}) == len(SPECIALTIES)


def test_a_known_diagnosis_has_its_specialty() -> None:
    asked = [*questions("train", 2400), *questions("test", 400)]
    melanoma = [question for question in asked if "melanoma" in question.prompt]
    assert melanoma
    assert {question.options[question.answer] for question in melanoma} == {" oncology"}


def test_too_many_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="texts for"):
        questions("test", 8000)


def test_question_is_a_value() -> None:
    assert Question("p", (" a", " b"), 1) == Question("p", (" a", " b"), 1)


@pytest.mark.parametrize(
    ("correct", "total", "expected"),
    [
        (0, 10, (0.0, 0.2775)),
        (5, 10, (0.2366, 0.7634)),
        (10, 10, (0.7225, 1.0)),
        (366, 400, (0.8836, 0.9385)),
    ],
)
def test_wilson_interval(correct: int, total: int, expected: tuple[float, float]) -> None:
    assert accuracy_interval(correct, total) == pytest.approx(expected, abs=1e-4)
