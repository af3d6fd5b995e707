"""What `test_eda` runs in a process of its own, under a contract with other labels and one locale more."""
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow as pa

from esci_nb.contract import LABELS, PRODUCT_COLUMNS, PROB_COLUMNS
from esci_nb.look import error_analysis, explore, labels, product_map, query_list, report, repeats, texts, words
from esci_nb.look.tables import Catalogue, EdaData, make_eda

WORDS = np.array(["rouge", "red", "chaise", "chair", "lampe", "lamp", "table", "grande", "green", "Zorvik"])


def made_up() -> tuple[pd.DataFrame, pd.DataFrame]:
    "Judgements of 80 queries in fr and us, and their products."
    rng = np.random.default_rng(0)
    products = pd.DataFrame({name: [" ".join(words) for words in rng.choice(WORDS, (900, 3))] for name in PRODUCT_COLUMNS})
    products = products.assign(product_id=[f"P{number}" for number in range(900)], product_locale=np.repeat(["fr", "us"], 450))
    examples = products[["product_id", "product_locale"]].iloc[np.r_[:900, :40]].reset_index(drop=True)
    number = np.r_[np.arange(900) // 12, np.full(40, 1000)]
    examples = examples.assign(example_id=np.arange(len(examples)), query_id=number, query=WORDS[number % len(WORDS)],
                               esci_label=rng.choice(LABELS, len(examples)), small_version=(number % 5 > 0).astype(int),
                               split=np.where(number % 3, "train", "test"))
    return examples, products


def look() -> None:
    "Draw and count everything."
    examples, products = made_up()
    data = make_eda("made up", examples, Catalogue(pa.Table.from_pandas(products, preserve_index=False)),
                    pd.DataFrame({"query_id": examples["query_id"].unique(), "source": "other"}))
    assert list(labels.label_table(data)) == list(LABELS) and labels.locale_table(data).loc["fr", "products"] == 450
    for plot in (labels.plot_labels, labels.plot_labels_by_locale, labels.plot_locales, labels.plot_depth, labels.plot_query_types):
        assert plot(data).get_title()
    look_at_texts(data)
    judged_twice = repeats.repeated_judgements(data)
    assert judged_twice.conflicts.shape == (3, 3)
    repeats.plot_conflicts(judged_twice)
    repeats.plot_drift(repeats.drift_table(repeats.list_features(data, texts.query_table(data))))
    repeats.plot_duplicates(repeats.duplicate_table(data, repeats.near_duplicates(data)))
    assert repeats.shared_table(data).loc["fr", "brands in test"] > 0
    look_at_runs(data)
    lists = examples[examples["small_version"] == 1]
    table = lists.assign(**dict(zip(PROB_COLUMNS, np.random.default_rng(2).dirichlet(np.ones(len(LABELS)), len(lists)).T)))
    scored = report.score_rows(lists, products, {report.ENSEMBLE: table})
    report.plot_ladder(report.compare(scored), "made up"), report.plot_against(scored, "made up"), report.plot_scores(scored, "made up")
    assert "fr" in scored.by_locale().index
    plt.close("all")


def look_at_texts(data: EdaData) -> None:
    "Everything in look.texts."
    texts.plot_missing(texts.quality_table(data))
    texts.plot_cleaning(texts.cleaning_table(data))
    lengths = texts.token_lengths(data)
    texts.plot_lengths(lengths)
    texts.plot_cut(lengths)
    names = texts.name_counts(data, "product_brand")
    assert "fr" in texts.tail_table(names).index
    texts.plot_tail(texts.tail_table(names), "product_brand")
    texts.plot_top_names(names, "brands")
    queries = texts.query_table(data)
    texts.plot_query_length(queries)
    texts.plot_mixing(queries, texts.borrowed_queries(data))
    texts.plot_overlap(texts.overlap_table(data))
    words.words_by_label(words.telling_words(data))
    assert all(f"<b>{label}</b>" in words.samples_html(data, label) for label in LABELS)
    product_map.plot_map(product_map.product_map(data, n=100))


def look_at_runs(data: EdaData) -> None:
    "Cards, widgets and the whole error analysis."
    first, second = (explore.with_ranks(data, pd.DataFrame(np.random.default_rng(seed).dirichlet(np.ones(len(LABELS)), len(data.rows)),
                                                           columns=list(PROB_COLUMNS))) for seed in (0, 1))
    explorer = explore.Explorer(data, first)
    explorer.locale.value, explorer.label.value = "fr", LABELS[1]
    assert "fr" in explorer.cards.value and f"{LABELS[2]}&nbsp;" in explorer.cards.value
    assert {"fr", "us"} == set(query_list.query_list(data, first)["locale"]) and query_list.packed_cards(data, [0, 1], first)
    scores = explore.list_scores(data, first)
    assert LABELS[0] in scores and f"first {LABELS[0]} at" in error_analysis.worst_lists(data, first)
    error_analysis.plot_loss(scores)
    confusion = error_analysis.confusion_table(data, first)
    assert confusion.xs("fr", level="locale").shape == (3, 3)
    error_analysis.plot_confusion(confusion)
    error_analysis.inversions_html(data, first, error_analysis.inversions(data, first))
    error_analysis.plot_disagreement(error_analysis.disagreement(data, first, second))
    error_analysis.plot_calibration(error_analysis.calibration_table(data, first))
