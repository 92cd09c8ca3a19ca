from retain.report.headlines import contrasts, headlines
from retain.report.summary import Summary
from retain.report.wording import plain


def told(record):
    return [(card.verdict, plain(f"{card.lead} ({card.caption}). {card.text}")) for card in headlines(Summary(record))]


def test_three_answers(forgetful):
    summary = Summary(forgetful)
    (good, learned), (bad, lost), (worse, general) = told(forgetful)
    assert (good, bad, worse) == ("gained", "lost", "lost")
    assert plain(summary.figures["learning_accuracy"].text) in learned
    assert "All 3 tasks rose beyond noise." in learned
    assert lost.startswith(plain(summary.figures["backward_transfer"].text))
    assert plain(summary.figures["backward_transfer"].range) in lost
    assert "Both earlier tasks fell beyond noise." in lost
    assert "General abilities suffered" in general
    assert "of 8 abilities fell beyond noise" in general
    assert "KL to the base: 0.300 nats a token." in general


def test_noise_is_said_in_words(build_record):
    record = build_record({"desk": (0.0, 0.9, 0.9), "menus": (0.0, 0.0, 0.9)}, drift=0.0)
    _, (lost, lost_text), (general, general_text) = told(record)
    assert (lost, general) == ("noise", "noise")
    assert "within noise" in lost_text
    assert "General abilities changed within noise" in general_text
    assert "none of the 8 abilities fell" in general_text


def test_a_mixture_is_counted(build_record):
    levels = {"a": (0.0, 0.9, 0.9, 0.2), "b": (0.0, 0.0, 0.9, 0.9), "c": (0.0, 0.0, 0.0, 0.0)}
    (_, learned), (lost_verdict, lost), _ = told(build_record(levels))
    assert "Of 3 tasks, 2 rose beyond noise and 1 changed within noise." in learned
    assert lost_verdict == "lost"
    assert "Of 2 earlier tasks, 1 fell beyond noise and 1 changed within noise." in lost
    card = headlines(Summary(build_record(levels)))[0]
    assert card.details[0].suite == "c"  # what failed comes first


def test_many_tasks_are_cut(build_record):
    levels = {f"t{j}": tuple(0.9 if stage > j else 0.0 for stage in range(9)) for j in range(8)}
    card = headlines(Summary(build_record(levels, num=40, num_probes=0)))[0]
    assert (len(card.details), card.rest) == (3, 5)


def test_one_task_alone(build_record):
    (_, learned), (verdict, lost), _ = told(build_record({"desk": (0.0, 0.9)}))
    assert "The task rose beyond noise." in learned
    assert "before -> when it was learned: +" in learned
    assert verdict == "unknown"
    assert "only one task" in lost


def test_what_was_not_measured_is_said(build_record):
    assert "Not measured: the run scored no probes." in told(build_record({"desk": (0.0, 0.9)}, num_probes=0))[2][1]
    base = told(build_record({"desk": (0.0,)}))
    assert "No task was learned yet." in base[0][1]
    assert "No task was learned yet." in base[1][1]
    assert "no stage comes after the base model" in base[2][1]
    joint = build_record({"desk": (0.0, 0.9), "menus": (0.0, 0.9)}, stages=["base", "joint"])
    assert "learned together" in told(joint)[1][1]


def test_mixed_units_are_counted_not_averaged(build_record):
    record = build_record({"desk": (0.0, 0.9, 0.7), "wiki": (0.2, 0.25, 0.8)}, metrics={"wiki": "perplexity"})
    (_, learned), (_, lost), _ = told(record)
    assert learned.startswith("2 of 2 (tasks better than the base model)")
    assert lost.startswith("1 of 1 (earlier tasks lost)")


def test_a_run_against_another(forgetful, protected):
    old, new, general = contrasts("B", "A", Summary(forgetful), Summary(protected))
    assert old.text == "B kept more of its old tasks than A."
    assert general.text == "B kept more general ability than A."
    assert (old.verdict, general.verdict) == ("gained", "gained")
    assert new.text == "B and A differ within noise."
    back = contrasts("A", "B", Summary(protected), Summary(forgetful))
    assert back[0].text == "A kept less of its old tasks than B."
    assert back[0].verdict == "lost"
