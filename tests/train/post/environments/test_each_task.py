"""Each task by hand: what its prompts look like, what is right, and what is not."""

import re
from collections import Counter

import pytest
from post_cases import play

from train.post.environments.arithmetic import LARGE as LARGE_SUMS
from train.post.environments.arithmetic import ArithmeticSize, Sums, arithmetic
from train.post.environments.coding import CodingSize, Digits, DigitsFile, FunctionFile, Repair, coding, right_lines
from train.post.environments.letters import STATEMENTS, value_after, values_after
from train.post.environments.logic import Cups, LogicSize, Order, logic
from train.post.environments.problems import Grade
from train.post.environments.programs import ProgramsSize, Reach, Write, programs
from train.post.environments.questions import Pairs, People, QuestionsSize, questions
from train.post.environments.recipes import INPUTS, KINDS, Instruction, function_of, results, share_right
from train.post.environments.rubric import Criterion, grade_by_rules, share_met
from train.post.environments.search import Pages, PagesIndex, Person, SearchSize, Words, WordsIndex, search
from train.post.environments.writing import Note, Word, WritingSize, writing


def test_letters_run_as_programs():
    assert values_after("adsftn", 4) == [5, 10, 7, 12, 36, 29] and value_after("adsftn", 4) == 29
    assert value_after("", 4) == 4 and value_after("az", 4) is None and value_after("a" * 65, 4) is None
    assert value_after("t" * 60, 99**9) is not None and value_after("d" * 64, 10**70) is None  # too long an integer
    assert set("adsftn") == STATEMENTS.keys()


def test_sums_are_written_and_graded():
    sums = Sums(7, "adsa", 2, 4)
    assert sums.prompt == "M07a??d??s??a??:"
    assert sums.chain + sums.answer == "a08d16s13a14#14"
    assert len(sums.prompt) - 1 - len("M07") == len(sums.chain)  # a slot is as wide as a step
    assert sums.grade("a08d16s13a14#14") == Grade(1.0, 1.0)
    assert sums.grade("#14") == Grade(1.0, 0.0)
    assert sums.grade("aaidbgsbdabe#14") == Grade(1.0, 0.0)
    assert sums.grade("a08d16sbdabe#14") == Grade(1.0, 0.5)
    assert sums.grade("a08d16s13a14#15") == Grade(0.0, 1.0)
    for wrong in ("14", "#14#14", "#14 ", "#014", "a08#14#", ""):
        assert sums.grade(wrong).outcome == 0.0


def test_sums_demonstrate_as_the_recipe_says():
    chains = {
        "steps": "([ads][0-9]{2}){4}",
        "twice": r"(([ads][0-9]{2}){4})\1",
        "letters": "([ads][a-j]{2}){4}",
        "at once": "",
    }
    kinds = Counter()
    for number in range(400):
        (text,) = arithmetic().demonstrate(number)
        chain, _, answer = text.partition("#")
        assert re.fullmatch("[0-9]{2}", answer)
        kinds[next(kind for kind, pattern in chains.items() if re.fullmatch(pattern, chain))] += 1
    for kind, share in {"steps": 0.35, "twice": 0.25, "letters": 0.15, "at once": 0.25}.items():
        assert abs(kinds[kind] / 400 - share) < 0.07


def test_sums_stay_within_their_digits():
    for size in (ArithmeticSize(), LARGE_SUMS):
        for number in range(60):
            problem = arithmetic(size).make(number).problem
            assert all(0 <= value < 10**size.digits for value in problem.values)
            assert size.steps[0] <= len(problem.operations) <= size.steps[1]


def test_cups_are_followed():
    cups = Cups(2, ((1, 3), (2, 4), (1, 2), (3, 4), (1, 3)), 5)
    assert cups.prompt == "L2;13;24;12;34;13:"
    assert cups.chain + cups.answer == "2,,4,,4,,3,,1,,=1"
    assert len("13;" * 5) == len(cups.chain)
    assert cups.grade("=1").outcome == 1.0 and cups.grade("2,,4,,4,,3,,1,,=1").outcome == 1.0
    for wrong in ("=4", "1", "=1=1", "=11", "=1,", ""):
        assert cups.grade(wrong).outcome == 0.0


def test_chains_begin_at_one_distance_behind_their_slots():
    """Whatever the number of steps, so that a step finds its operation."""
    assert Sums(7, "ad", 2, 4).prompt == "M07a??d??......:"
    assert Cups(2, ((1, 3), (2, 4)), 4).prompt == "L2;13;24;..;..:"
    for task in (arithmetic(LARGE_SUMS), logic(LogicSize(swaps=(2, 9)))):
        assert len({len(task.make(number).reset()) for number in range(30)}) == 1


def test_orders_are_found_from_their_clues():
    order = Order("abc", ("b>c", ">>a", "a>b"))
    assert order.prompt == "O;b>c;>>a;a>b:"
    assert order.chain + order.answer == ">>a;a>b;b>c;=abc"
    assert order.grade("=abc").outcome == 1.0 and order.grade("=acb").outcome == 0.0


def test_both_kinds_of_puzzles_are_drawn():
    task = logic(LogicSize(kinds=("cups", "order"), people=(5, 5)))
    problems = [task.make(number).problem for number in range(40)]
    assert {type(problem) for problem in problems} == {Cups, Order}
    for problem in problems:
        if isinstance(problem, Order):
            assert sorted(problem.clues) == sorted(
                f"{a}>{b}" for a, b in zip(">" + problem.row, problem.row, strict=False)
            )


def test_programs_of_letters_are_run_and_their_notes_are_not_believed():
    reach = Reach(3, 7, 2, "da")
    assert reach.prompt == "P03>07:" and reach.demonstrate(None) == ["d06a07="]
    for right in ("d06a07=", "da=", "aaaa=", "d99a00=", "aad10s07="):
        assert reach.grade(right).outcome == 1.0
    for wrong in ("d06a07", "d06a08s05=", "=", "a04=", "x07=", "d06a07==", "d006a07=", "d06a07=\n", " da=", "DA=", ""):
        assert reach.grade(wrong).outcome == 0.0


def test_every_way_to_a_value_gets_there_within_its_distance():
    for size in (ProgramsSize(), ProgramsSize(operations="adsftn", letters=(3, 5), digits=3, distance=50)):
        for number in range(80):
            problem = programs(size).make(number).problem
            assert problem.grade(problem.demonstrate(None)[0]).outcome == 1.0
            assert 0 < abs(problem.target - problem.start) <= size.distance


def test_one_prompt_is_one_problem_whatever_way_was_drawn():
    assert repr(Reach(3, 7, 2, "da")) == repr(Reach(3, 7, 2, "aaaa"))


STEPS = (Instruction("add", 3, 9), Instruction("odd", 1, 9))


def test_functions_are_graded_by_every_test():
    write = Write(STEPS)
    assert write.prompt == "Write f(n): add 3; if it is odd, add 1; return it. f(4)=8:"
    assert write.grade("def f(n){n=n+3;if n%2==1{n=n+1;}return n;}").outcome == 1.0
    assert write.grade("def f(n){return (n+4)/2*2;}").outcome == 1.0
    for wrong in (
        "def f(n){return 8;}",  # right where the prompt shows it
        "def f(n){return n+3;}",
        "def g(n){n=n+3;if n%2==1{n=n+1;}return n;}",
        "def f(n){return str((n+4)/2*2);}",
        "def f(n){while 1{}}",
        "def f(n){return f(n);}",
        "",
    ):
        assert write.grade(wrong).outcome == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_of_a_recipe_does_what_its_words_say(kind):
    """Against Python, from the words."""
    meaning = {
        "add": lambda n: n + 3, "subtract": lambda n: n - 3, "multiply": lambda n: n * 3, "halve": lambda n: n // 2,
        "odd": lambda n: n + 3 if n % 2 else n, "above": lambda n: n - 3 if n > 8 else n,
        "below": lambda n: n + 3 if n < 8 else n, "repeat": lambda n: n + 3 * 8,
    }  # fmt: skip
    assert results(function_of([Instruction(kind, 3, 8)])) == tuple(map(meaning[kind], INPUTS))


def test_the_share_of_tests_counts_no_errors():
    expected = results("def f(n){return n;}")
    assert share_right("def f(n){return n;}", expected) == 1.0
    assert share_right("def f(n){return 10/n*n/10;}", expected) < 1.0
    assert share_right("def f(n){", (None,) * len(INPUTS)) == 0.0


def test_digits_are_edited_until_their_test_passes():
    file = DigitsFile(Digits((1, 2, 4), 7, 15))
    assert file.reset() == "E124+07>15:"
    assert file.step("r") == ("124+\n", False)
    assert file.step("2+") == ("134ok\n", False)
    assert file.step("3+") == ("135-\n", False)
    assert file.step("3-") == ("134ok\n", False)
    assert file.outcome == 0.0  # until the model says that it is done
    assert file.step("=") == ("", True) and file.outcome == 1.0


def test_calls_on_digits_that_are_none_are_answered():
    file = DigitsFile(Digits((0, 9, 4), 7, 21))
    for text in ("4+", "0+", "1-", "2+", "r ", "", "=1", "1*", "10+"):
        assert file.step(text) == ("!\n", False)
    assert file.row == "094" and file.step("=") == ("", True) and file.outcome == 0.0


def test_a_function_is_repaired_and_tested_beyond_what_is_shown():
    lines = tuple(line.replace("n+3", "n+4") for line in right_lines(STEPS))
    file = FunctionFile(Repair(STEPS, lines))
    assert file.reset() == (
        "Repair f(n): [2] add 3; [3] if it is odd, add 1; return it. Now: [1] def f(n){ [2] n=n+4; "
        "[3] if n%2==1{n=n+1;} [4] return n;} Calls: test, set LINE CODE, done.\n"
    )
    assert file.step("test") == ("fail: f(1) is 6, not 4\n", False)
    assert file.step("set 2 n=n+3;") == ("[2] n=n+3;\n", False)
    assert file.step("test") == ("6 tests pass\n", False)
    assert file.step("set 9 n=n;") == ("error: no call, or no line of 4\n", False)
    assert file.step("done") == ("", True) and file.outcome == 1.0


def test_passing_the_tests_that_are_shown_is_not_enough():
    file = FunctionFile(Repair(STEPS, tuple(right_lines(STEPS))))
    file.step("set 4 if n>20{n=0;}return n;}")
    assert file.step("test") == ("6 tests pass\n", False)
    assert file.step("done").done and file.outcome == 0.0


def test_a_function_that_never_ends_fails_its_test():
    file = FunctionFile(Repair(STEPS, tuple(right_lines(STEPS))))
    file.step("set 2 while 1{}")
    assert file.step("test") == ("fail: f(0) is an error, not 4\n", False)
    assert file.step("done").done and file.outcome == 0.0


def test_bugs_show_in_the_tests_that_a_model_sees():
    task = coding(CodingSize(kind="function"))
    for number in range(40):
        assert task.make(number).step("test").observation.startswith("fail: f(")


def test_words_are_looked_up():
    index = WordsIndex(Words(2, ("ab", "ce", "xy", "qq", "rr")))
    assert index.reset() == "S2ab:"
    assert index.step("?ab") == ("ab>ce\n", False)
    assert index.step("?zz") == ("zz>--\n", False)
    for text in ("ab", "?abc", "?A1", ""):
        assert index.step(text) == ("!\n", False)
    assert index.step("=xy") == ("", True) and index.outcome == 1.0


@pytest.mark.parametrize("answer", ["=ce", "=qq", "=", "=xy ", "=XY"])
def test_other_words_are_no_answer(answer):
    index = WordsIndex(Words(2, ("ab", "ce", "xy", "qq", "rr")))
    assert index.step(answer).done and index.outcome == 0.0


def test_words_demonstrate_as_the_recipe_says():
    right = [play(search(), number, search().demonstrate(number)).environment.outcome for number in range(400)]
    assert abs(sum(right) / 400 - 0.5) < 0.07


PEOPLE = (
    Person("Tola Vesk", "baker", "Corin", (1, 2, 1, 2)),
    Person("Mira Lund", "weaver", "Istra", (2, 2, 0, 0)),
    Person("Bena Vesk", "miller", "Corin", (0, 1, 0, 1)),
)


def test_pages_are_found_and_followed():
    pages = Pages(PEOPLE, 0, (1, 0), 2)
    index = PagesIndex(pages)
    assert pages.question == "Question: who is the mentor of the rival of Tola Vesk?"
    assert index.reset() == pages.question + " Calls: search WORDS, answer NAME.\n"
    found = index.step("search Tola Vesk").observation
    assert found.startswith(
        "Tola Vesk: a baker in Corin; the mentor is Mira Lund; the rival is Bena Vesk; the neighbour is Mira Lund; "
    )
    assert found.count(": a ") == 2
    assert index.step("search zzz") == ("nothing found\n", False)
    for text in ("search", "search  ", "look Tola", "", "search " + "a" * 201):
        assert index.step(text).observation.startswith("error: no call")
    assert pages.answer == "Tola Vesk" and index.step("answer Tola Vesk").done and index.outcome == 1.0


def test_a_search_for_a_name_finds_its_page_first():
    task = search(SearchSize(kind="pages", hops=(2, 4)))
    for number in range(20):
        index = task.make(number)
        for person in index.problem.people:
            assert index.step(f"search {person.name}").observation.startswith(f"{person.name}: ")


def test_questions_of_pages_lead_on_and_never_back():
    task = search(SearchSize(kind="pages", hops=(2, 4)))
    for number in range(60):
        way = task.make(number).problem.way
        assert len(set(way)) == len(way)


@pytest.mark.parametrize(
    ("rule", "argument", "good", "bad"),
    [
        ("begins", "Dear", "Dear you", "My Dear"),
        ("ends", "?", "Is it?", "It is."),
        ("characters", "3", "abc", "abcd"),
        ("words", "2", "two words", "these are three"),
        ("words", "2", "one", ""),
        ("mentions", "river", "the river.", "the rivers"),
        ("mentions", "a.c", "an a.c there", "an abc there"),
        ("omits", "river", "the rivers", "a river"),
        ("alphabet", "abc", "cab", "cabin"),
    ],
)
def test_rules_say_what_a_text_does(rule, argument, good, bad):
    criterion = Criterion(rule, argument)
    assert criterion.met(good) and not criterion.met(bad)
    assert argument in criterion.words and criterion.words.startswith("The text ")


def test_rubrics_are_weighted_and_what_has_no_rule_is_left_to_judges():
    rubric = (Criterion("begins", "a", 3.0), Criterion("ends", "z"), Criterion("", "The text is kind.", 9.0))
    assert grade_by_rules(rubric, "abc").outcome == 0.75
    assert share_met(rubric, [1.0, 0.0, 0.5]) == pytest.approx(7.5 / 13)
    assert rubric[2].words == "The text is kind." and grade_by_rules(rubric[2:], "a").outcome == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"), [(("sings", "a"), "rule of a criterion"), (("ends", "a", 0.0), "weight of a criterion")]
)
def test_criteria_that_are_none_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Criterion(*arguments)


def test_words_are_written_to_order():
    word = Word("k", "m", 5)
    assert word.prompt == "Wkm5:"
    grades = {text: word.grade(text).outcome for text in ("kaoem", "kaoen", "baoem", "kaem", "k1oem", "")}
    assert grades == {"kaoem": 1.0, "kaoen": 0.75, "baoem": 0.75, "kaem": 0.75, "k1oem": 0.75, "": 0.25}


def test_notes_are_written_to_order():
    note = Note("Mira Lund", "bridge", ("lantern", "river"), "kettle", 20)
    right = "Dear Mira Lund, the bridge has a lantern over the river. Will you come?"
    assert note.grade(right).outcome == 1.0
    assert note.grade(right.replace("lantern", "kettle")).outcome == pytest.approx(5 / 7)
    assert all(f"'{word}'" in note.prompt for word in ("lantern", "river", "kettle", "Dear Mira Lund,"))
    assert note.rubric[-1].rule == "" and "friendly" in note.rubric[-1].words


def test_demonstrations_without_breaks_are_right():
    for kind in ("word", "note"):
        task = writing(WritingSize(kind=kind, broken=0.0))
        assert all(play(task, number, task.demonstrate(number)).environment.outcome == 1.0 for number in range(50))


def test_pairs_are_asked_for():
    pairs = Pairs((("b", 7), ("c", 2), ("k", 4)), 1)
    assert pairs.prompt == "Qb7c2k4?c:"
    grades = {text: pairs.grade(text).outcome for text in ("c is 2", "2", "c is 7", "b is 7 c is 2 k is 4", "")}
    assert grades == {"c is 2": 1.0, "2": 0.8, "c is 7": 0.4, "b is 7 c is 2 k is 4": 0.0, "": 0.4}


def test_people_are_asked_for():
    people = People((("Tola Vesk", "baker", "Corin"), ("Mira Lund", "weaver", "Istra")), 0)
    assert people.prompt == (
        "Tola Vesk is a baker in Corin. Mira Lund is a weaver in Istra. What does Tola Vesk do, and where?\n"
    )
    assert people.grade("Tola Vesk is a baker in Corin.").outcome == 1.0
    assert people.grade("Tola Vesk is a weaver in Istra.").outcome == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ArithmeticSize(steps=(0, 4)), "steps must be at least 1"),
        (lambda: ArithmeticSize(operations="az"), "operations must be different letters of adsftn, got 'az'"),
        (lambda: ArithmeticSize(operations="aa"), "operations"),
        (lambda: ArithmeticSize(digits=7), "digits must be at most 6"),
        (lambda: LogicSize(kinds=()), "kinds must be some of cups, order"),
        (lambda: LogicSize(cups=10), "cups must be at most 9"),
        (lambda: LogicSize(people=(1, 27)), "people must be at most 26|people must be at least 2"),
        (lambda: ProgramsSize(kinds=("reach", "sing")), "kinds must be some of reach, write"),
        (lambda: ProgramsSize(distance=0), "distance must be at least 1"),
        (lambda: CodingSize(kind="sing"), "kind must be one of digits, function"),
        (lambda: CodingSize(bugs=(1, 4)), "bugs must be at most 3"),
        (lambda: SearchSize(kind="sing"), "kind must be one of words, pages"),
        (lambda: SearchSize(hops=(1, 9)), "max_turns must be at least 10, got 8"),
        (lambda: WritingSize(kind="sing"), "kind must be one of word, note"),
        (lambda: WritingSize(broken=1.5), "broken must be a share"),
        (lambda: QuestionsSize(facts=10), "facts must be at most 9"),
        (lambda: QuestionsSize(kind="sing"), "kind must be one of pairs, people"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_some_problems_never_change():
    """What a number draws is part of the recorded results; these lines stand for all."""
    tasks = (arithmetic(), programs(), logic(), coding(), search(), writing(), questions())
    assert [task.make(0).reset() for task in tasks] == PINNED


PINNED = [
    "M06d??d??d??d??:",
    "P36>31:",
    "L4;13;23;24;14;13:",
    "E572+30>43:",
    "S1lv:",
    "Wmr7:",
    "Ql7z8j5?z:",
]
