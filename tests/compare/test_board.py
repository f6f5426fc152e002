"""The board: its data, its pictures, and the page in a real headless Chromium."""

import csv
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chromium import Page, installed
from command_line import recurgolf
from run_folders import write_metrics, write_run
from smoke_runs import train

from recurgolf.compare.board import board_data, by_passes, page, write_board
from recurgolf.compare.comparison import compare
from recurgolf.compare.runs import find_runs

BPB = {"1": [1.6031, 1.6012, 1.6003], "2": [1.5871, 1.5902, 1.5853]}
LEDGER = {
    "components": [
        {"component": "mlp", "params": 10, "predicted": 600_000.4, "actual": 599_000.0},
        {"component": "mixer", "params": 5, "predicted": 250_000.0, "actual": 261_000.0},
    ],
    "code": {"packed": 40_000, "raw": 90_000},
}
NASTY = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Two settings by three seeds, one run that did not finish, one over its budget."""
    folder = tmp_path_factory.mktemp("sweep")
    for rank, bpbs in BPB.items():
        for seed, bpb in enumerate(bpbs, 1):
            own = {"by_passes": {"1": bpb + 0.2, "2": bpb}, "artifact_bytes": 900_000 + seed}
            if (rank, seed) == ("2", 3):
                own |= {"status": "over_budget", "within_budget": False}
            run = write_run(folder / f"{rank}_{seed}", seed, bpb, f"lora.rank={rank}", **own)
            (run / "ledger.json").write_text(json.dumps(LEDGER))
            (run / "train.log").write_text("a log\n")
            loop = {f"loop__residual_rms__visit{v:02d}": 0.5 + v / 8 for v in range(4)}
            loop |= {"loop__contraction__pass02": 0.75, "val__bpb": bpb - 0.01}
            write_metrics(run, 100, [3.0, 2.5, 2.25, 2.0], **loop)
    write_run(folder / "unfinished", 4, None, "lora.rank=2", name=NASTY)
    return folder


@pytest.fixture(scope="module")
def board(sweep, tmp_path_factory) -> Path:
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("board") / "board.html"
    write_board([sweep], out)
    return out


@pytest.fixture(scope="module")
def opened(board, tmp_path_factory):
    if installed() is None:
        pytest.skip("there is no Chromium on this machine")
    with Page(tmp_path_factory.mktemp("profile")) as shown:
        shown.size(1500, 1000)
        shown.open(board)
        yield shown


def data_of(folder: Path) -> dict:
    return board_data(find_runs([folder]), folder, "title")


def test_the_data_are_those_of_the_folders(sweep):
    data = data_of(sweep)
    assert data["groups"] == ["lora.rank=1", "lora.rank=2"]
    assert len(data["runs"]) == 7
    run = next(r for r in data["runs"] if r["folder"] == "2_2")
    assert (run["val_bpb"], run["artifact_bytes"], run["seed"]) == (1.5902, 900_002, "2")
    assert run["settings"] == {"lora.rank": "2"}
    assert data["common"]["trainer.steps"] == "20"
    assert run["bytes"][1] == {"component": "mixer", "planned": 250_000.0, "actual": 261_000.0}
    assert run["bytes"][2] == {"component": "code", "planned": None, "actual": 40_000}
    assert run["curves"]["train/loss"]["y"] == [3.0, 2.5, 2.25, 2.0]
    assert run["curves"]["train/loss"]["tokens"][-1] == 409_600
    assert run["visits"][-1]["residual_rms"] == {"0": 0.5, "1": 0.625, "2": 0.75, "3": 0.875}
    assert run["visits"][-1]["contraction"] == {"2": 0.75}
    assert run["links"]["train.log"] == "2_2/train.log"
    lost = next(r for r in data["runs"] if r["folder"] == "unfinished")
    assert (lost["status"], lost["val_bpb"]) == ("unfinished", None)


def test_passes_come_from_the_field_or_from_the_names_of_evaluations():
    assert by_passes({"by_passes": {"10": 1.0, "2": 2.0}}) == {"2": 2.0, "10": 1.0}
    evals = {"sliding": {"val_bpb": 1.5}, "sliding/passes=3": {"val_bpb": 1.4}}
    assert by_passes({"evals": evals}) == {"3": 1.4}


def test_many_runs_share_the_points(sweep):
    losses = [3 - n / 1000 for n in range(1000)]
    write_metrics(sweep / "1_1", 1000, losses)
    curve = data_of(sweep)["runs"][0]["curves"]["train/loss"]
    assert len(curve["y"]) == 400
    assert (curve["step"][0], curve["step"][-1]) == (1, 1000)
    assert all(
        y == pytest.approx(losses[x - 1]) for x, y in zip(curve["step"], curve["y"], strict=True)
    )
    write_metrics(sweep / "1_1", 100, [3.0, 2.5, 2.25, 2.0])


def test_real_runs_make_a_board_with_what_happened_at_every_visit(tmp_path):
    run = train(
        "looping=cycle",
        "looping.passes=2",
        "lora.rank=2",
        "trainer.log_every=5",
        "trainer.telemetry=log",
    )
    (found,) = data_of(run.path)["runs"]
    assert found["val_bpb"] == run.summary["val_bpb"]
    moments = found["visits"]
    assert len(moments) >= 2
    last = [event for event in run.events if "loop/cosine/visit01" in event][-1]
    assert moments[-1]["cosine"]["1"] == pytest.approx(last["loop/cosine/visit01"], rel=1e-5)
    assert list(found["sampled_passes"]) == ["1", "2"]
    assert sum(line["actual"] for line in found["bytes"]) == pytest.approx(
        run.summary["artifact_bytes"], abs=1
    )


def test_the_page_is_one_file_that_names_no_address(board):
    text = board.read_text()
    own = text[: text.index("plotly.js")] if "plotly.js" in text else text
    assert not re.search(r"(src|href)=[\"']?https?:", own)
    assert "default-src 'none'" in own
    assert NASTY not in text  # a name cannot end the script that holds it
    for name in ("pareto", "curves", "bytes", "passes"):
        picture = board.with_name(f"board_{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 5_000


def test_without_the_plotting_library_the_command_says_what_to_install(tmp_path, sweep):
    folder = tmp_path / "plotly"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('no plotly here', name='plotly')")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['matplotlib'] = sys;"
        "from pathlib import Path; from recurgolf.compare.board import write_board;"
        "write_board([Path(sys.argv[2])], Path(sys.argv[3]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(sweep), str(tmp_path / "b.html")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert "ConfigError" in ended.stderr
    assert "plotly is not installed: pip install 'recurgolf[board]'" in ended.stderr
    assert not (tmp_path / "b.html").exists()


def test_a_folder_without_runs_is_refused(tmp_path):
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    refused = recurgolf("board", ".", cwd=tmp_path).refused()
    assert "no run in or below it" in refused


def test_a_failed_run_lends_the_finished_ones_no_words(tmp_path):
    for rank in (1, 2):
        write_run(tmp_path / str(rank), 1, 1.5, f"lora.rank={rank}")
    write_run(tmp_path / "lost", 1, None, "lora.rank=2", "looping.passes=3")
    labels = data_of(tmp_path)["groups"]
    assert labels[:2] == ["lora.rank=1", "lora.rank=2"]
    assert len(labels) == 3 and "looping.passes=3" in labels[2]


def test_settings_on_different_texts_share_no_verdict(tmp_path):
    for text in ("a", "b"):
        for seed in (1, 2):
            told = {"text": {"name": "t", "fingerprint": text * 64, "tokenizer": "t" * 64}}
            write_run(tmp_path / f"{text}{seed}", seed, 1.5 + seed / 100, **told)
    data = data_of(tmp_path)
    assert data["sets"] == [0, 1]
    assert data["verdicts"] == {"0": {}, "1": {}}


def test_a_baseline_that_names_no_setting_is_refused(sweep, tmp_path):
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    told = recurgolf("board", str(sweep), "--baseline", "lora.rank=7", cwd=tmp_path).refused()
    assert "lora.rank=7" in told and "lora.rank=1; lora.rank=2" in told


def test_watch_rebuilds_the_page_when_a_run_ends(tmp_path):
    pytest.importorskip("plotly")
    write_run(tmp_path / "runs" / "1", 1, 1.5)
    out = tmp_path / "b.html"
    command = ["-m", "recurgolf", "board", tmp_path / "runs", "--out", out, "--watch", "0.2"]
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What a shell starts in the background has Ctrl-C ignored, and its children too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as watching:
        assert watching.stdout is not None
        try:
            assert "Ctrl-C stops" in watching.stdout.readline()
            assert "1.53125" not in out.read_text()
            write_run(tmp_path / "runs" / "2", 2, 1.53125)
            assert "rebuilt at" in watching.stdout.readline()
            watching.send_signal(signal.SIGINT)
            assert watching.wait(20) == 0
        finally:
            watching.kill()
    assert "1.53125" in out.read_text()


# ---- in the browser


def drawn(plot: str, name: str) -> str:
    """A trace of a plot, as JavaScript."""
    return f"document.getElementById('{plot}').data.find(t => t.name.startsWith('{name}'))"


def settings_column(shown: Page, name: str) -> list[str]:
    return shown.texts(f'#runs tbody td[data-key="{name}"]')


def test_the_page_loads_without_an_error_or_a_request(opened, board):
    assert opened.troubles == []
    assert opened.requests == [board.as_uri()]
    assert opened.texts("#counts") == ["7 of 7 runs, 6 of them finished, 2 settings"]


def setting(shown: Page, number: int, key: str) -> str:
    (text,) = shown.texts(f'#groups tr[data-group="{number}"] td[data-key="{key}"]')
    return text.strip("▸▾ ")


def test_the_tables_show_the_right_numbers(opened):
    mean, deviation = statistics.fmean(BPB["1"]), statistics.stdev(BPB["1"])
    assert setting(opened, 0, "label") == "lora.rank=1"
    assert setting(opened, 0, "n") == "3"
    assert setting(opened, 0, "val_bpb") == f"{mean:.4f} ± {deviation:.4f}"
    assert setting(opened, 0, "artifact_bytes") == "900,002 ± 1"
    assert setting(opened, 0, "bytes_planned") == "890,000"  # the code's 40,000 among them
    assert setting(opened, 0, "bytes_code") == "40,000"
    assert (setting(opened, 1, "over"), setting(opened, 1, "lost")) == ("1", "1")
    assert settings_column(opened, "val_bpb") == [
        *(f"{bpb:.4f}" for bpb in sorted(BPB["1"] + BPB["2"])),
        "-",
    ]


def test_verdicts_are_those_of_compare_against_the_baseline_one_chooses(opened, sweep):
    for base, other in ((0, 1), (1, 0)):
        opened.choose("#baseline", str(base))
        (told,) = compare([sweep], f"lora.rank={base + 1}").verdicts
        assert setting(opened, base, "verdict") == "baseline"
        assert setting(opened, other, "verdict") == told.word
        gain = setting(opened, other, "gain").replace("−", "-")
        assert gain == f"{told.tests['welch'].gain:+.4f}"
        (said,) = opened.texts("#answer")
        if told.word == "better":
            words = f"lora.rank={other + 1} is better than lora.rank={base + 1} by {gain[1:]} bits"
            assert said.startswith(words)
        else:
            assert said == f"No setting is better than lora.rank={base + 1}; 1 {told.word}."
    opened.choose("#baseline", "0")
    assert setting(opened, 1, "verdict") == "better"
    opened.type("#filter", "seed != 1")
    opened.wait("document.querySelectorAll('#runs tbody tr').length === 5")
    assert setting(opened, 1, "verdict") == "filtered"  # other seeds than compare's
    opened.type("#filter", "")
    opened.wait("document.querySelectorAll('#runs tbody tr').length === 7")


def test_settings_sort_and_open_their_seeds(opened):
    def labels() -> list[str]:
        cells = opened.texts("#groups tbody td.label")
        return [text.strip("▸▾ ") for text in cells]

    assert labels() == ["lora.rank=2", "lora.rank=1"]  # the best first
    opened.click('#groups th[data-key="label"] button')
    assert labels() == ["lora.rank=1", "lora.rank=2"]
    opened.click('#groups tr[data-group="0"] .toggle')
    assert labels() == ["lora.rank=1", "seed 1", "seed 2", "seed 3", "lora.rank=2"]
    assert "1.6012" in opened.texts("#groups tr.seed:nth-child(3) td")
    opened.click('#groups tr[data-group="0"] .toggle')
    opened.click('#groups th[data-key="val_bpb"] button')
    assert labels() == ["lora.rank=2", "lora.rank=1"]


def test_headings_sort_both_ways_and_what_is_unknown_stays_last(opened):
    opened.click('#runs th[data-key="artifact_bytes"] button')
    assert settings_column(opened, "artifact_bytes")[:3] == ["900,001", "900,001", "900,002"]
    opened.click('#runs th[data-key="artifact_bytes"] button')
    assert settings_column(opened, "artifact_bytes")[:2] == ["900,003", "900,003"]
    assert settings_column(opened, "artifact_bytes")[-1] == "-"
    sorted_by = opened.texts('#runs th[aria-sort="descending"]')
    assert sorted_by == ["bytes"]
    opened.click('#runs th[data-key="val_bpb"] button')


@pytest.mark.parametrize(
    ("filter", "count"),
    [
        ("lora.rank=2", 4),
        ("val_bpb<1.589", 2),
        ("lora.rank=2 seed>=2", 3),
        ("finished", 6),  # five, and the one that is unfinished
        ("status=finished", 5),
        ("val_bpb < 1.589", 2),
        ("lora.rank = 2  seed >= 2", 3),
        ("seed!=1", 5),
        ("-unfinished", 6),
        ("-lora.rank=2", 3),
        ("nothing-like-this", 0),
        ("", 7),
    ],
)
def test_the_filter_knows_words_settings_and_figures(opened, filter, count):
    opened.type("#filter", filter)
    opened.wait(f"document.querySelectorAll('#runs tbody tr').length === {count}")
    assert opened.texts("#counts")[0].startswith(f"{count} of 7 runs")
    finished = [text for text in settings_column(opened, "val_bpb") if text != "-"]
    opened.wait(f"{drawn('pareto', 'seeds')}.x.length === {len(finished)}")
    assert opened.value("document.getElementById('empty').hidden") == (count > 0)


@pytest.mark.parametrize(
    ("filter", "said"),
    [("val_bpbb<1.6", "no setting or figure is called val_bpbb"), ("val_bpb <", "what number?")],
)
def test_a_filter_that_makes_no_sense_is_said_and_hides_nothing(opened, filter, said):
    opened.type("#filter", filter)
    opened.wait("document.getElementById('trouble').textContent !== ''")
    assert said in opened.texts("#trouble")[0]
    assert opened.texts("#counts")[0].startswith("7 of 7 runs")
    opened.type("#filter", "")
    opened.wait("document.getElementById('trouble').textContent === ''")


def test_the_plots_draw_the_figures_of_the_runs(opened):
    seeds = opened.value(f"[0].map(_ => {drawn('pareto', 'seeds')})[0]")
    assert sorted(seeds["y"]) == sorted(BPB["1"] + BPB["2"])
    means = opened.value(f"[0].map(_ => {drawn('pareto', 'means')})[0]")
    assert means["y"] == [pytest.approx(statistics.fmean(BPB[rank])) for rank in ("1", "2")]
    best = opened.value(f"[0].map(_ => {drawn('pareto', 'best')})[0]")
    assert (best["x"], best["y"]) == ([900_002], [means["y"][1]])  # same size, lower
    middle = opened.value(f"[0].map(_ => {drawn('passes', 'lora.rank=1, mean')})[0]")
    assert middle["x"] == [1, 2]
    assert middle["y"] == [pytest.approx(means["y"][0] + 0.2), pytest.approx(means["y"][0])]
    opened.choose("#curve", "train/loss")
    opened.choose("#axis", "tokens")
    opened.choose("#lines", "seeds")
    passes = opened.value("document.getElementById('passes').data.map(t => [t.x, t.y])")
    assert [[1, 2], [pytest.approx(BPB["1"][0] + 0.2), BPB["1"][0]]] in passes
    curve = opened.value("[0].map(i => document.getElementById('curves').data[i])[0]")
    assert curve["y"] == [3.0, 2.5, 2.25, 2.0]
    assert curve["x"] == [25 * 4096, 50 * 4096, 75 * 4096, 100 * 4096]
    opened.choose("#smooth", "0.5")
    smooth = opened.value("document.getElementById('curves').data[0].y")
    assert smooth == pytest.approx([3.0, (1.5 + 2.5) / 1.5, (0.75 + 1.25 + 2.25) / 1.75, 2.2], 1e-9)
    opened.choose("#smooth", "0")


def test_curves_are_means_with_a_band_over_the_seeds(opened):
    opened.choose("#curve", "val/bpb")
    opened.choose("#lines", "mean")
    mean = opened.value(f"{drawn('curves', 'lora.rank=2')}.y")
    assert mean == [pytest.approx(statistics.fmean(BPB["2"]) - 0.01)]
    bands = opened.value(
        "document.getElementById('curves').data.filter(t => t.name === 'deviation')"
        ".map(t => t.y[1] - t.y[0])"
    )
    assert pytest.approx(2 * statistics.stdev(BPB["2"])) in bands


def test_a_dot_hides_the_curves_of_its_setting(opened):
    opened.click('#legend [data-hide="0"]')
    names = "document.getElementById('curves').data.map(t => t.name).filter(n => n !== 'deviation')"
    assert opened.value(names) == ["lora.rank=2, mean of 3"]
    assert sorted(opened.value(f"{drawn('pareto', 'seeds')}.y")) == sorted(BPB["2"])
    opened.click('#groups [data-hide="0"]')
    assert len(opened.value(names)) == 2


def test_the_address_brings_back_what_one_saw(opened, board, tmp_path):
    opened.type("#filter", "lora.rank = 2")
    opened.wait("location.hash.includes('filter')")
    opened.choose("#axis", "seconds")
    opened.choose("#baseline", "1")
    opened.click('#groups tr[data-group="1"] .toggle')
    address = opened.value("location.href")
    with Page(tmp_path / "profile") as again:
        again._call("Page.navigate", url=address)
        again.wait("document.body && document.body.dataset.ready === 'yes'")
        assert again.texts("#counts")[0].startswith("4 of 7 runs")
        assert again.value("document.getElementById('filter').value") == "lora.rank = 2"
        assert again.value("document.getElementById('axis').value") == "seconds"
        assert setting(again, 1, "verdict") == "baseline"
        assert len(again.texts("#groups tr.seed")) == 4
    opened.open(board)
    assert opened.texts("#counts")[0].startswith("7 of 7 runs")


def test_what_is_shown_can_be_taken_away_as_csv(opened, tmp_path):
    opened._call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    opened.type("#filter", "lora.rank=2 finished -unfinished")
    opened.wait("document.querySelectorAll('#runs tbody tr').length === 2")
    opened.click("#csv")
    end = time.monotonic() + 20
    while not (tmp_path / "runs.csv").exists() and time.monotonic() < end:
        time.sleep(0.05)
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["lora.rank"], float(row["val_bpb"])) for row in rows] == [
        ("2", 1.5871),
        ("2", 1.5902),
    ]
    opened.type("#filter", "")
    opened.wait("document.querySelectorAll('#runs tbody tr').length === 7")


def test_a_row_opens_its_run_with_links_bytes_and_visits(opened):
    opened.click('#runs tbody tr:nth-child(2) td[data-key="seed"]')
    opened.wait("!document.getElementById('run').hidden")
    row = opened.texts("#runs tbody tr:nth-child(2) td")
    assert row[2] == "1.5871"
    assert opened.texts("#run-name") == ["smoke, seed 1: lora.rank=2"]
    assert opened.texts('[data-fact="val_bpb"]') == ["1.587100 (packing costs 0.0100)"]
    assert "train.log" in opened.texts("#run-links a")
    address = opened.value("document.querySelector('#run-links a').href")
    assert Path(address.removeprefix("file://")).read_text() == "a log\n"
    bars = opened.value("document.getElementById('bytes').data.map(t => [t.name, t.x])")
    assert bars == [
        ["planned", [600_000.4, 250_000, None]],
        ["actual", [599_000, 261_000, 40_000]],
    ]
    visits = opened.value("document.getElementById('visits-residual_rms').data[0].y")
    assert visits == [0.5, 0.625, 0.75, 0.875]
    assert opened.value("document.getElementById('visits-contraction').data[0].x") == [2]


@pytest.mark.parametrize("width", [390, 1440, 2560])
def test_the_plots_of_an_opened_run_keep_to_their_columns(opened, board, width):
    opened.size(width, 1000)
    opened.open(board)
    opened.click('#runs tbody tr:nth-child(2) td[data-key="seed"]')
    opened.wait("!document.getElementById('run').hidden")
    wide = opened.value(
        "[...document.querySelectorAll('.plot:has(.main-svg)')].map(plot => ["
        "plot.querySelector('.main-svg').getBoundingClientRect().width,"
        "plot.parentElement.getBoundingClientRect().width, plot.getBoundingClientRect().right])"
    )
    assert len(wide) >= 5
    for drawing, column, right in wide:
        assert drawing <= column + 1
        assert right <= width
    broken = opened.value(  # a part of a label that stands on two lines
        "[...document.querySelectorAll('td .part')].filter(e => e.offsetHeight > 32).length"
    )
    assert broken == 0
    opened.size(1500, 1000)


@pytest.mark.parametrize("table", ["groups", "runs"])
def test_values_stand_under_their_headings(opened, table):
    sides = opened.value(
        f"[...document.querySelectorAll('#{table} tr:is(thead *, tbody > :first-child)')]"
        ".map(row => [...row.cells].map(c => getComputedStyle(c).textAlign))"
    )
    assert len(sides) == 2 and sides[0] == sides[1]


def test_two_runs_are_held_side_by_side(opened):
    opened.choose("#one", "0")
    opened.choose("#other", "4")
    rows = opened.value(
        "[...document.querySelectorAll('#difference tbody tr')]"
        ".map(r => [...r.cells].map(c => c.textContent))"
    )
    assert rows == [["seed", "1", "2"], ["lora.rank", "1", "2"]]
    opened.choose("#other", "0")
    assert opened.texts("#difference tbody td") == ["nothing differs"]


def test_a_name_is_text_wherever_it_stands(opened):
    assert opened.value("document.querySelectorAll('img').length") == 0
    assert NASTY in settings_column(opened, "name")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1920], ids=["phone", "wide"])
def test_it_is_legible_on_every_screen(opened, width, dark):
    opened.size(width, 900, dark)
    opened.wait(f"document.documentElement.dataset.theme === '{'dark' if dark else 'light'}'")
    opened.wait("document.documentElement.scrollWidth <= window.innerWidth")
    contrast = opened.value(
        """(() => {
          const light = (text) => {
            const [r, g, b] = text.match(/\\d+/g).slice(0, 3).map((part) => {
              const c = part / 255;
              return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const back = light(getComputedStyle(document.body).backgroundColor);
          const texts = [...document.querySelectorAll("td, th, p, h1, h2, a, figcaption, span")];
          return Math.min(...texts.filter((e) => e.textContent.trim()).map((e) => {
            const front = light(getComputedStyle(e).color);
            return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
          }));
        })()"""
    )
    assert contrast > 4.5  # WCAG AA
    sizes = opened.value(
        "[...document.querySelectorAll('td, th, p')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 13
    opened.size(1500, 1000)


def test_a_thousand_runs_open_within_three_seconds_of_work(sweep, tmp_path):
    """The page's own thread, as other programs on the machine do not count."""
    plotly = pytest.importorskip("plotly.offline")
    if installed() is None:
        pytest.skip("there is no Chromium on this machine")
    data = data_of(sweep)
    base = next(run for run in data["runs"] if run["folder"] == "2_2")
    curve = {key: list(range(60)) for key in ("step", "tokens", "seconds")}
    data["groups"] = [f"lora.rank={rank}" for rank in range(200)]
    data["sets"] = [0] * 200
    data["runs"] = [
        {
            **base,
            "seed": str(number % 5),
            "group": number // 5,
            "settings": {"lora.rank": str(number // 5)},
            "val_bpb": 1.6 - (number * 7919 % 1000) / 1e5,
            "artifact_bytes": 900_000 + number * 104_729 % 50_000,
            "curves": {
                key: {**curve, "y": [round(3 - n / 40 + number / 1e4, 6) for n in range(60)]}
                for key in ("train/loss", "val/bpb")
            },
        }
        for number in range(1000)
    ]
    path = tmp_path / "board.html"
    path.write_text(page(data, plotly.get_plotlyjs()))
    assert path.stat().st_size < 12e6
    with Page(tmp_path / "profile") as shown:
        shown.size(1500, 1000)
        shown.count_work()
        shown.open(path)
        assert shown.work_seconds() < 3.0
        assert shown.texts("#counts") == [
            "1,000 of 1,000 runs, 1,000 of them finished, 200 settings"
        ]
        shown.click("#all")
        shown.wait("document.querySelectorAll('#runs tbody tr').length === 1000")
        assert shown.troubles == []
