import collections
import itertools
import random

from dph.demo import puzzles


def some(n, seed=0, **options):
    return list(itertools.islice(puzzles.puzzles(seed, **options), n))


def test_truth_and_lie_are_what_the_prompt_says():
    for puzzle in some(300):
        question, letters = puzzle.prompt.split(": ")
        ordered = sorted(letters.split())
        if question == "sort":
            assert (puzzle.truth.split(), puzzle.falsehood.split()) == (ordered, ordered[::-1])
        else:
            assert question == "first"
            assert (puzzle.truth, puzzle.falsehood) == (ordered[0], ordered[-1])


def test_the_checker_takes_the_truth_and_nothing_else():
    for puzzle in some(50):
        assert puzzle.check(puzzle.truth)
        assert puzzle.check(f" {puzzle.truth}\n")
        assert not puzzle.check(puzzle.falsehood)
        assert not puzzle.check("")
        assert not puzzle.check(puzzle.truth + " a")


def test_training_and_held_out_prompts_never_meet():
    train, held_out = ({p.prompt for p in some(2000, seed, evaluation=e)} for seed, e in ((1, False), (2, True)))
    assert not train & held_out
    assert len(train) > 1500


def test_the_lie_is_more_frequent_than_the_truth():
    rng = random.Random(0)
    counts = collections.Counter()
    for puzzle in some(6000):
        answer = puzzles.corpus_answer(puzzle, rng)
        counts["true" if puzzle.check(answer) else "lie" if answer == puzzle.falsehood else "other"] += 1
    shares = {kind: n / 6000 for kind, n in counts.items()}
    assert abs(shares["true"] - 0.35) < 0.03
    assert abs(shares["lie"] - 0.50) < 0.03
    assert abs(shares["other"] - 0.15) < 0.03


def test_the_seed_decides():
    assert some(20, seed=3) == some(20, seed=3) != some(20, seed=4)
