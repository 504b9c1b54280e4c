"""Scores of generated captions: pycocoevalcap's numbers, with 95% intervals over images, and baselines.

pycocoevalcap is the scorer: BLEU, ROUGE-L and CIDEr in Python, METEOR and SPICE in Java. What this module adds is
everything around it: tokens where there is no Java and for Chinese, intervals, and a run that neither hangs nor
prints. What cannot be computed is absent with its reason, never zero.

Scores are fractions from 0 to 1 (papers print percent), CIDEr from 0 to 10.

Java runs in a child process (this file as a script) with a time limit: pycocoevalcap leaves the Java programs'
messages on the terminal, waits for ever on one that is stuck, and hangs in METEOR's destructor after an error.

Own tokens against PTB, measured: all 2,030 different captions of UCM captions have the same tokens, and so BLEU-1 to
4, ROUGE-L and CIDEr of its 210 test images are the same to the last digit, for each image's first caption against its
other four (BLEU-4 0.6606, CIDEr 3.280) and for the most frequent training caption of its class against all five
(0.7305, 3.495). `pytest tests/test_caption_scores.py -k own_tokens -s` prints and checks it. Captions with more
unusual punctuation may differ a little: see `english_tokens`. METEOR runs on Java 17, seen; SPICE was never run here.
"""

import contextlib
import html
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

import metrics
import report
from config import InputError

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
SCORES = (*BLEU, "METEOR", "ROUGE-L", "CIDEr", "SPICE")
SECONDS = {"ptb": 60, "meteor": 120, "spice": 600}  # METEOR alone takes 10 to load its paraphrases
SECONDS_PER_TEXT = {"ptb": 0.01, "meteor": 0.02, "spice": 1.0}
CORENLP = "stanford-corenlp-3.6.0.jar"  # what SPICE parses with; a download of 400 MB that is never begun from here

# ---------------------------------------------------------------------------------------------
# Tokens

HAN = "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
_HAN = re.compile(HAN)
_RUN = re.compile(r"[^\W_]+(?:[.,][0-9]+)*")  # between punctuation; 3.5 is one
_CHARACTER = re.compile(rf"{HAN}|(?:(?!{HAN})[^\W_])+(?:[.,][0-9]+)*")

# PTB's spellings: curly quotes are straight, dashes two hyphens, brackets words (which pycocoevalcap's list of
# punctuation, written in capitals, then fails to remove: they stay in its tokens, and here).
_PTB = {"‘": "'", "’": "'", "‛": "'", "“": " ", "”": " ", '"': " ", "`": " ", "–": "--", "—": "--", "…": " "}
_PTB |= {"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- "}
_PTB |= {"€": "$", "£": "#", "²": " ² ", "³": " ³ ", "°": " ° ", "\u00ad": "", "\u200b": "", "\ufeff": ""}
_PTB = str.maketrans(_PTB)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SPLIT = [  # "houses' roofs" needs no rule: a lone apostrophe is punctuation
    (re.compile(r"(?<=[a-z])(n't)\b|(?<=\w)('(?:s|m|d|re|ve|ll))\b", re.I), r" \1\2"),
    (re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(lem|gim)(me)\b", re.I), r"\1\3\5\7 \2\4\6\8"),
]
_ABBREVIATION = (
    "mr|mrs|ms|dr|prof|jr|sr|st|ave|rd|blvd|ft|sq|vs|etc|inc|co|corp|ltd|dept|jan|feb|mar|apr|aug|sept|oct|nov|dec"
)
_TOKEN = re.compile(
    rf"""-[lr][rsc]b-                                # a bracket
    | '(?:s|m|d|re|ve|ll)\b | '[0-9]+s\b | n't\b     # the end of a contraction; '90s
    | </?[a-z][^\s<>]*>                              # a tag
    | (?:[^\W\d_]\.){{2,}}(?![^\W_]) | [^\W\d_]\.(?![^\W_])(?=.*[^\W_])  # u.s.; a letter's period, but not the last
    | (?:{_ABBREVIATION})\.(?![^\W_]) | no\.(?=\s*[0-9])
    | (?:(?<!\S)-(?=[0-9]))? (?:[#@](?=[^\W\d_]))?   # -5, #tag, @name
      [^\W_] (?:[^\W_] | [-_./'@!?](?=[^\W_]) | (?<=[0-9])[,:](?=[0-9]))*  # a word, a number, blue-green, and/or, 3:45
    | [?!]{{2,}} | [$%&+*=~^|°#@/\\<>]               # what the list of punctuation leaves in
    """,
    re.X | re.I,
)


def one_line(text: str) -> str:
    """`text` with single spaces: PTBTokenizer reads one text a line, and takes \\v, U+2028 and others for its end."""
    return " ".join(_CONTROL.sub(" ", text).encode("utf-8", "replace").decode().split())


def english_tokens(text: str) -> list[str]:
    """Lower-case words close to PTBTokenizer's (Penn Treebank), less the punctuation pycocoevalcap removes.

    Split: it 's, do n't, can not, 10 %, $ 5. Kept whole: blue-green, 1,000, 3.5, and/or, u.s., etc., ?!
    Left different: 'tis, y'all, rock'n'roll, web addresses, abbreviations that are not listed above.
    """
    text = one_line(text).translate(_PTB)
    for pattern, parts in _SPLIT:
        text = pattern.sub(parts, text)
    return [token.lower() for token in _TOKEN.findall(text)]


def chinese_characters(text: str) -> list[str]:
    """Each Chinese character; a run of Latin letters and digits is one. Widths as NFKC, punctuation removed."""
    return _CHARACTER.findall(unicodedata.normalize("NFKC", one_line(text)).lower())


@lru_cache(1)
def jieba_cutter():
    """jieba's own dictionary, silently and without the cache file that jieba shares with all users of /tmp."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources, escapes
        import jieba
    jieba.setLogLevel("ERROR")
    cutter = jieba.Tokenizer()
    cutter.FREQ, cutter.total = cutter.gen_pfdict(cutter.get_dict_file())
    cutter.initialized = True
    return cutter


def chinese_words(text: str) -> list[str]:
    """jieba's words. Widths as NFKC, punctuation removed."""
    runs = _RUN.findall(unicodedata.normalize("NFKC", one_line(text)).lower())
    return [run if not _HAN.search(run) else word for run in runs for word in jieba_cutter().cut(run)]


def language_of(text: str) -> str:
    """Of a text with a Chinese character in it "zh", else "en"."""
    return "zh" if _HAN.search(text) else "en"


# ---------------------------------------------------------------------------------------------
# Java, in a child process


def _in_child(task: str, **given) -> tuple[dict | None, str]:
    """-> (what the task gives, "") or (None, the reason why not)."""
    if shutil.which("java") is None:
        return None, "no Java on PATH"
    texts = given.get("texts") or [text for candidates, _, _ in given["runs"] for text in candidates]
    seconds = SECONDS[task] + SECONDS_PER_TEXT[task] * len(texts)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"encoding": "utf-8", "errors": "replace"}
    child = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), task], start_new_session=True, **pipes)
    try:
        out, noise = child.communicate(json.dumps(given), timeout=seconds)
    except subprocess.TimeoutExpired:
        return None, f"Java took longer than {seconds:.0f} s"
    finally:
        for name in ("SIGTERM", "SIGKILL"):  # the first stops Java, and our child tidies up
            if child.poll() is None:
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    os.killpg(child.pid, getattr(signal, name)) if hasattr(os, "killpg") else child.kill()
                    child.wait(3)
        for pipe in (child.stdin, child.stdout, child.stderr):
            with contextlib.suppress(OSError):
                pipe.close()
    if child.returncode == 0:
        return json.loads(out), ""
    lines = [line.strip() for line in noise.splitlines() if line.strip()]
    return None, " / ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))[:300] or f"Java failed ({child.returncode})"


def _ptb(texts: list[str]) -> dict:
    """Tokens of each text, by pycocoevalcap's PTBTokenizer.

    It reads all texts as lines of one file, and looks across their ends: "at point A." keeps its period or not by
    how the next line begins. So each text is followed by the same line, and its tokens are its own; the line also
    shows that no row was shifted, which PTBTokenizer itself would not notice.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    lines = [line for text in texts for line in (text, "The next line.")]
    with _writable(ptbtokenizer):
        made = ptbtokenizer.PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(lines)})
    if len(made) != len(lines) or any(made[i] != ["the next line"] for i in range(1, len(lines), 2)):
        raise RuntimeError(f"PTBTokenizer read {len(lines)} lines and gave {len(made)}, or shifted them")
    return {"texts": [made[i][0] for i in range(0, len(lines), 2)]}


@contextlib.contextmanager
def _writable(ptbtokenizer):
    """PTBTokenizer writes a file beside its jar, where a user of a shared environment may not: then beside a link to the jar."""
    home, jar = Path(ptbtokenizer.__file__), ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    if os.access(home.parent, os.W_OK):
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(home.with_name(jar), Path(folder) / jar)
        ptbtokenizer.__file__ = str(Path(folder) / home.name)
        try:
            yield
        finally:
            ptbtokenizer.__file__ = str(home)


def _keyed(candidates: list[str], references: list[list[str]]) -> tuple[dict, dict]:
    """As pycocoevalcap takes them: references and the one candidate of each image."""
    return dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)}


def _meteor(runs: list, samples: int, seed: int) -> dict:
    """METEOR 1.5 and its interval, of several runs (candidates, references, groups): it takes ten seconds to start.

    The score of many images is that of their summed counts (like BLEU's), not the mean of their scores. The Java
    program gives the counts of each image and scores any counts, so a resample is its sum, scored by the program.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    one_image = meteor._stat

    def scored(candidates, references, groups):
        references = [[re.sub(r"\|{3,}", " ", text) for text in texts] for texts in references]  # its field separator
        lines: list[str] = []
        meteor._stat = lambda *texts: lines.append(one_image(*texts)) or lines[-1]
        value, each = meteor.compute_score(*_keyed(candidates, references))
        counts = np.array([line.split() for line in lines], dtype=np.float64)
        # 0, 1: length of candidate and reference; 20: chunks; 21, 22: matched words. A perfect match's one chunk
        # does not count towards the sum.
        perfect = (counts[:, 0] == counts[:, 1]) & (counts[:, 21:] == counts[:, :1]).all(1) & (counts[:, 20] == 1)
        counts[:, 20] -= perfect
        drawn = metrics._resampled_means(*metrics._by_group(counts, groups), samples, seed)
        sums = np.round(np.concatenate([counts.sum(0)[None], drawn * len(counts)]), 6)
        texts = (" ".join(map(str, row)) for row in sums.tolist())
        meteor.meteor_p.stdin.write(("EVAL ||| " + " ||| ".join(texts) + "\n").encode())
        meteor.meteor_p.stdin.flush()
        answers = [float(meteor.meteor_p.stdout.readline()) for _ in range(len(sums) + 1)]  # the last is of all
        known = abs(answers[0] - value) < 1e-9  # or this METEOR sums in another way, and the interval would be wrong
        interval = metrics._percentiles(np.array(answers[1:-1]), 0.95) if known else None
        return {"value": value, "per_image": each, "interval": interval}

    try:
        return {"runs": [scored(*run) for run in runs]}
    except Exception:
        meteor.meteor_p.kill()
        sys.stderr.write(meteor.meteor_p.stderr.read().decode(errors="replace") + "\n")
        raise


def _spice(runs: list, samples: int, seed: int) -> dict:
    """SPICE of several runs: the mean of per-image F scores."""
    from pycocoevalcap.spice.spice import Spice

    spice, made = Spice(), []
    for candidates, references, groups in runs:
        value, each = spice.compute_score(*_keyed(candidates, references))
        each = [float(image["All"]["f"]) for image in each]
        interval = metrics.bootstrap_interval(each, groups, samples=samples, seed=seed)  # refuses NaN
        made.append({"value": float(value), "per_image": each, "interval": interval})
    return {"runs": made}


def _child(task: str):
    """What `_in_child` starts: a JSON object on standard input, one on standard output, all noise on standard error."""
    out = os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, lambda *_: None)  # ends Java alone, and PTBTokenizer then removes its file
    try:
        given = json.loads(sys.stdin.buffer.read())
        made = json.dumps({"ptb": _ptb, "meteor": _meteor, "spice": _spice}[task](**given))
        with os.fdopen(out, "w", encoding="utf-8") as file:
            file.write(made)
    except BaseException as error:
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(2, f"\n{type(error).__name__}: {error}\n".encode())
        os._exit(1)  # METEOR's destructor waits for a lock that is never released
    os._exit(0)


# ---------------------------------------------------------------------------------------------
# Scores


def _checked(candidates, references) -> tuple[list[str], list[list[str]]]:
    candidates = list(candidates)
    references = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
    if len(candidates) != len(references) or not candidates:
        raise InputError(
            f"captions: expected one candidate and a list of references per image, at least one image; got "
            f"{len(candidates)} candidates and {len(references)} lists of references"
        )
    for i, (candidate, texts) in enumerate(zip(candidates, references)):
        for text in (candidate, *texts):
            if not isinstance(text, str):
                raise InputError(f"captions of image {i}: expected strings, got {type(text).__name__}")
        if not any(map(str.strip, texts)):
            raise InputError(f"captions: image {i} has no reference")
    return candidates, references


def _bleu(totals: np.ndarray) -> np.ndarray:
    """totals (..., 10): candidate length, reference length, n-grams of 1 to 4, correct ones -> BLEU-1..4 (..., 4).

    Papineni et al. 2002, with the small constants by which pycocoevalcap avoids divisions by zero.
    """
    length, reference, grams, correct = totals[..., :1], totals[..., 1:2], totals[..., 2:6], totals[..., 6:]
    precision = np.cumprod((correct + 1e-15) / (grams + 1e-9), axis=-1) ** (1 / np.arange(1, 5))
    ratio = (length + 1e-15) / (reference + 1e-9)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))


def _python_scores(
    candidates: list[str], references: list[list[str]], groups: list | None, samples: int, seed: int
) -> dict:
    """{name: {value, interval, per_image (BLEU-1 to 3 without)}} of tokens joined by spaces, by pycocoevalcap."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    scorer = BleuScorer(n=4)
    for pair in zip(candidates, references):
        scorer += pair
    bleu, bleu_each = scorer.compute_score(option="closest")  # the reference length that Bleu() takes
    images = _keyed(candidates, references)
    made = {"ROUGE-L": Rouge().compute_score(*images), "CIDEr": Cider().compute_score(*images)}

    counts = [
        [c["testlen"], scorer._single_reflen(c["reflen"], "closest", c["testlen"]), *c["guess"], *c["correct"]]
        for c in scorer.ctest
    ]
    sums = np.column_stack([counts, *(each for _, each in made.values())]).astype(np.float64)  # (N, 10 + 2)
    # The same images for all scores.
    drawn = metrics._resampled_means(*metrics._by_group(sums, groups), samples, seed)
    drawn = np.column_stack([_bleu(drawn[:, :10] * len(sums)), drawn[:, 10:]])
    interval = [metrics._percentiles(column, 0.95) for column in drawn.T]

    scores = {name: {"value": float(bleu[k]), "interval": interval[k]} for k, name in enumerate(BLEU)}
    scores["BLEU-4"]["per_image"] = [float(score) for score in bleu_each[3]]
    for k, (name, (value, each)) in enumerate(made.items()):
        scores[name] = {"value": float(value), "interval": interval[4 + k], "per_image": each.tolist()}
    return scores


def _java_scores(runs: list, samples: int, seed: int) -> tuple[dict, dict]:
    """-> {"METEOR" and "SPICE": scores of each run as in `_python_scores`}, {name: why it is absent}."""
    scores, absent = {}, {}
    for name in ("METEOR", "SPICE"):
        home = Path(importlib.util.find_spec("pycocoevalcap.spice").submodule_search_locations[0])
        if name == "SPICE" and shutil.which("java") and not (home / "lib" / CORENLP).is_file():
            command = "python -m pycocoevalcap.spice.get_stanford_models"
            absent[name] = f"needs Stanford CoreNLP 3.6.0 ({command}, some 400 MB) and Java 8 or 11"
            continue
        made, reason = _in_child(name.lower(), runs=runs, samples=samples, seed=seed)
        if made:
            scores[name] = made["runs"]
        else:
            absent[name] = reason
    return scores, absent


def _groups(candidates, references, language: str) -> dict[str, list[tuple[int, str, list[str]]]]:
    """{language: [(image, candidate, references in that language)]}, as `caption_scores` says."""
    groups: dict[str, list] = {"en": [], "zh": []}
    for i, (candidate, texts) in enumerate(zip(candidates, references)):
        chosen = language
        if language == "auto":
            spoken = [language_of(text) for text in texts if text.strip()]
            chosen = language_of(candidate) if candidate.strip() else spoken[0]
            chosen = chosen if chosen in spoken else spoken[0]
            texts = [text for text in texts if language_of(text) == chosen]
        groups[chosen].append((i, candidate, texts))
    return {spoken: group for spoken, group in groups.items() if group}


def _tokens(group: list[tuple[int, str, list[str]]], cut) -> tuple[list[int], list[str], list[list[str]]]:
    """-> positions of the images, candidates and references as tokens joined by spaces; no reference is empty."""
    join = lru_cache(None)(lambda text: " ".join(cut(text)))
    truths = [[text for text in map(join, texts) if text] for _, _, texts in group]
    if [] in truths:
        raise InputError(f"captions: image {group[truths.index([])][0]} has no reference with a word in it")
    return [i for i, _, _ in group], [join(candidate) for _, candidate, _ in group], truths


def _all_scores(systems: list[list[str]], references, language, tokens, java, samples, seed, groups=None) -> list[dict]:
    """`caption_scores` of several lists of candidates at once: Java starts once for all of them."""
    if language not in ("auto", "en", "zh") or tokens not in ("auto", "ptb", "words", "chars"):
        raise InputError(f"captions: no such language or tokens: {language!r}, {tokens!r}")
    checked = [_checked(candidates, references) for candidates in systems]
    grouped = [_groups(*captions, language) for captions in checked]
    for spoken, wrong, name in (("en", "chars", "English"), ("zh", "ptb", "Chinese")):
        if tokens == wrong and any(spoken in parts for parts in grouped):
            raise InputError(f"captions: tokens {tokens!r} are not for {name}")

    # What splits a text, for each language; and why METEOR and SPICE are left out, where they are.
    cutters = {"en": {"words": english_tokens}, "zh": {"words": chinese_words, "chars": chinese_characters}}
    missing = {"en": "" if java else "left out (java=False)", "zh": "for English only"}
    english = [row for parts in grouped for row in parts.get("en", ())]
    if english and tokens != "words":
        texts = sorted({one_line(text) for _, candidate, listed in english for text in (candidate, *listed)} - {""})
        made = None
        if java:
            made, missing["en"] = _in_child("ptb", texts=texts)
        if made:
            table = dict(zip(texts, made["texts"])) | {"": ""}
            cutters["en"] = {"ptb": lambda text: table[one_line(text)].split(" ")}
        elif tokens == "ptb":
            raise InputError(f"captions: tokens 'ptb': {missing['en']}")

    results, runs = [], []
    for parts in grouped:
        results.append({"images": len(checked[0][0]), "parts": []})
        for spoken, group in parts.items():
            for kind, cut in cutters[spoken].items():
                if tokens in ("words", "chars") and kind != tokens:
                    continue
                index, own, truths = _tokens(group, cut)
                part = {
                    "language": spoken,
                    "tokens": kind,
                    "images": len(group),
                    "empty": own.count(""),
                    "longest": max(len(text.split()) for text in own),
                    "absent": dict.fromkeys(("METEOR", "SPICE"), missing[spoken]) if missing[spoken] else {},
                    "index": index,
                }
                results[-1]["parts"].append(part)
                runs.append((part, own, truths, groups and [groups[i] for i in index]))
    with ThreadPoolExecutor(1) as thread:  # Java is a process of its own: our scores are counted beside it
        counted = [thread.submit(_python_scores, *run[1:], samples, seed) for run in runs]
        for_java = [run for run in runs if not missing[run[0]["language"]]]
        found, absent = _java_scores([run[1:] for run in for_java], samples, seed) if for_java else ({}, {})
    for (part, *_), ours in zip(runs, counted):
        part["scores"] = ours.result()
    for k, (part, *_) in enumerate(for_java):
        part["scores"] |= {name: made[k] for name, made in found.items()}
        part["absent"] = dict(absent)
    for part in (part for result in results for part in result["parts"]):
        scores = {name: part["scores"].get(name, {"value": None, "interval": None}) for name in SCORES}
        part["per_image"] = {name: score.pop("per_image") for name, score in scores.items() if "per_image" in score}
        part["scores"] = {
            name: {"value": score["value"], "interval": score["interval"] and tuple(score["interval"])}
            for name, score in scores.items()
        }
    return results


def caption_scores(
    candidates: list[str],
    references: list[list[str]],
    *,
    language: str = "auto",
    tokens: str = "auto",
    java: bool = True,
    samples: int = 1000,
    seed: int = 0,
) -> dict:
    """Scores of one candidate per image against the image's references; N images, any number of references each.

    -> {"images": N, "parts": [part]}, a part for each language and kind of tokens: English gives one (by
    pycocoevalcap's PTBTokenizer, or where there is no Java by `english_tokens`), Chinese two (by jieba's words, by
    characters: papers use either), a mixed run all three, each over its own images:

        {"language": "en" | "zh", "tokens": "ptb" | "words" | "chars", "images": n, "empty": candidates of no token,
         "scores": {name: {"value": float | None, "interval": (low, high) | None}},  every name of SCORES
         "absent": {name: reason},                                               names whose value is None
         "index": [n positions in candidates],
         "per_image": {"BLEU-4" | "ROUGE-L" | "CIDEr" | "METEOR" | "SPICE": [n floats]}}

    BLEU (Papineni et al. 2002; of the corpus, closest reference length), METEOR 1.5 (Denkowski & Lavie 2014; of the
    corpus), ROUGE-L (Lin 2004, beta 1.2), CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726; pycocoevalcap's "CIDEr" is
    this one), SPICE (Anderson et al. 2016, arXiv:1607.08822). CIDEr weighs words by how few images of this very call
    have them: it is comparable only over the same images, and 0 for a single one. METEOR and SPICE know English only.

    Intervals: 95%, percentile bootstrap over images. ROUGE-L, CIDEr and SPICE are means of per-image scores, which
    are resampled as they are (CIDEr's document frequencies stay those of all images); BLEU and METEOR are computed
    anew from the summed counts of the drawn images. All scores of a part see the same draws.

    language: "auto" takes an image's references in the candidate's language, or where there are none those in its
    first reference's language (a Chinese character makes a text Chinese). "en", "zh": all texts are taken for that.
    tokens: "auto" as above; "ptb" fails where Java does not work; "words"; "chars" for Chinese.
    java: False leaves out all that needs it, as if it were absent: METEOR takes 10 seconds to start, too long for a
    validation during training.

    An empty candidate scores 0 and counts. A reference without any word ("...") is left out. `InputError`: different
    lengths, no image, an image without a reference, something that is not a string, tokens that do not fit.
    """
    return _all_scores([candidates], references, language, tokens, java, samples, seed)[0]


# ---------------------------------------------------------------------------------------------
# Variety and baselines


def _flat(captions) -> list[str]:
    """All texts of [texts of an image] (a lone text may stand for a list of one)."""
    texts = [text for texts in captions for text in ([texts] if isinstance(texts, str) else texts)]
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"captions: expected strings, got {type(text).__name__}")
    return [text for text in texts if text.strip()]


@lru_cache(1 << 17)  # the training captions are the same for every model that is compared
def _own_tokens(text: str) -> tuple[str, ...]:
    return tuple((chinese_characters if language_of(text) == "zh" else english_tokens)(text))


def caption_stats(candidates: list[str], training_captions=()) -> dict:
    """How varied captions are, and how many are copies. training_captions: [[texts of an image]], or texts.

    -> {"captions": M, "distinct", "distinct_share", "copied", "copied_share", "mean_length", "empty"}. Captions are
    equal when their tokens are (`english_tokens`, or `chinese_characters` of a text with Chinese in it), so letter
    case and punctuation do not count. `copied`: those equal to a training caption; None where there is none to
    compare with. `mean_length`: in these tokens. `InputError`: no candidate.
    """
    if not len(candidates):
        raise InputError("captions: expected at least one candidate")
    own = [_own_tokens(text) for text in candidates]
    seen = {_own_tokens(text) for text in set(_flat(training_captions))} - {()}
    copied = sum(key in seen for key in own) if seen else None
    return {
        "captions": len(own),
        "distinct": len(set(own)),
        "distinct_share": len(set(own)) / len(own),
        "copied": copied,
        "copied_share": copied / len(own) if seen else None,
        "mean_length": sum(map(len, own)) / len(own),
        "empty": own.count(()),
    }


def most_frequent_caption(training_captions) -> str:
    """The caption that occurs most often, all captions of all images counted (spaces apart, as they are written);
    of several as frequent the first in order of code points. A model that does not beat it has not used the image."""
    counts = Counter(line for line in map(one_line, _flat(training_captions)) if line)
    if not counts:
        raise InputError("captions: expected at least one training caption")
    return min(counts, key=lambda line: (-counts[line], line))


def nearest_captions(features, train_features, train_captions: list[list[str]]) -> list[str]:
    """For each image the first caption of the training image nearest to it by cosine: the copying baseline.

    features (N, D), train_features (M, D), of any length but zero; train_captions: M lists. Cosines within
    `metrics.TIE` of the best are equal, and the first of these training images is taken. `InputError`: lengths or
    dimensions that differ, an image without a caption; `ValueError`: NaN, or nothing at all.
    """
    sides = []
    for name, value in (("features", features), ("train_features", train_features)):
        array = metrics._array(value, name, 2)
        length = np.linalg.norm(array, axis=1, keepdims=True)
        if (length == 0).any():
            raise InputError(f"{name}: row {int(np.argmin(length))} is all zeros and has no direction")
        sides.append((array / length).astype(np.float32))
    queries, gallery = sides
    if queries.shape[1] != gallery.shape[1] or len(gallery) != len(train_captions):
        raise InputError(
            f"nearest captions: features {queries.shape}, training features {gallery.shape} and "
            f"{len(train_captions)} lists of training captions do not belong together"
        )
    first = [next((text for text in ([t] if isinstance(t, str) else t) if text.strip()), "") for t in train_captions]
    if "" in first:
        raise InputError(f"nearest captions: training image {first.index('')} has no caption")
    chosen, block = [], max(1, metrics.BLOCK // len(gallery))
    for start in range(0, len(queries), block):
        cosines = queries[start : start + block] @ gallery.T  # (B, M)
        chosen += (cosines >= cosines.max(1, keepdims=True) - np.float32(metrics.TIE)).argmax(1).tolist()
    return [first[i] for i in chosen]


# ---------------------------------------------------------------------------------------------
# A model beside its baselines

MODELS = {
    "frequent": "the most frequent training caption",
    "nearest": "caption of the nearest training image",
    "captioner": "captioner",
}


_NAMES = {"en": "English", "zh": "Chinese", "ptb": "PTB tokens", "words": "words", "chars": "characters"}


def baselines(features, train_features, train_captions: list[list[str]]) -> dict[str, list[str]]:
    """{name: a caption for each image} that need no captioner: `most_frequent_caption` and `nearest_captions`."""
    frequent = most_frequent_caption(train_captions)
    return {
        "frequent": [frequent] * len(features),
        "nearest": nearest_captions(features, train_features, train_captions),
    }


def cider(candidates: list[str], references: list[list[str]], language: str = "auto") -> float:
    """CIDEr alone, without Java and without an interval: what is watched in training. Chinese by words. Of a mixed run
    the mean over images, each language weighing words by its own images."""
    from pycocoevalcap.cider.cider import Cider

    total, cutters = 0.0, {"en": english_tokens, "zh": chinese_words}
    for spoken, group in _groups(*_checked(candidates, references), language).items():
        _, own, truths = _tokens(group, cutters[spoken])
        total += float(sum(Cider().compute_score(*_keyed(own, truths))[1]))
    return total / len(candidates)


def compare(made: dict[str, list[str]], references: list[list[str]], training=(), **options) -> dict[str, dict]:
    """{name: `caption_scores`, and as "stats" `caption_stats`} of several models' captions of the same images; Java
    starts once for all. options: those of `caption_scores`; groups: the image of each text, where one has several."""
    options = {"language": "auto", "tokens": "auto", "java": True, "samples": 1000, "seed": 0} | options
    results = _all_scores(list(made.values()), references, **options)
    return {
        name: result | {"stats": caption_stats(texts, training)} for (name, texts), result in zip(made.items(), results)
    }


def per_image(result: dict) -> list[dict]:
    """{score: value} of each image, in order, from a result of `caption_scores`. Chinese by words where there are both."""
    rows: list[dict] = [{} for _ in range(result["images"])]
    for part in reversed(result["parts"]):  # words come before characters, and are written over them
        for k, i in enumerate(part["index"]):
            rows[i] = {name: values[k] for name, values in part["per_image"].items()}
    return rows


def without_images(found: dict) -> dict:
    """`compare`'s result without what it holds of every image: for a summary."""
    return {
        name: result
        | {"parts": [{k: v for k, v in part.items() if k not in ("index", "per_image")} for part in result["parts"]]}
        for name, result in found.items()
    }


def tables(found: dict) -> list[tuple[str, list[dict], dict[str, str], str]]:
    """`compare`'s result as [(title, rows, columns, notes)], a table for each language and kind of tokens, a row for each
    model: for `report.table_text` and `report.table_html`. What no model has is no column; the notes say why."""
    made = []
    for key in dict.fromkeys((p["language"], p["tokens"]) for result in found.values() for p in result["parts"]):
        rows, spans, absent, images = [], [], {}, 0
        for name, result in found.items():
            for part in (p for p in result["parts"] if (p["language"], p["tokens"]) == key):
                title, images = MODELS.get(name, name), max(images, part["images"])
                values = {score: part["scores"][score]["value"] for score in SCORES}
                # BLEU adds 1e-15 to every count: where nothing matches it says 1e-11 or so, which means none; and where no
                # caption has n words BLEU-n says 0.03.
                values |= {name: 0.0 for n, name in enumerate(BLEU, 1) if n > part["longest"]}
                row = {"model": title} | {k: v if v is None else round(v, 4) for k, v in values.items()}
                stats = result.get("stats", {})
                row |= {k: stats.get(k) for k in ("distinct", "copied_share", "mean_length")}
                rows.append(row)
                spans.append("{} {:.3f} to {:.3f}".format(title, *part["scores"]["CIDEr"]["interval"]))
                absent |= part["absent"]
        headings = {name: name for name in SCORES} | {"distinct": "distinct", "copied_share": "copied"}
        headings |= {"mean_length": "length"}
        columns = {"model": ""} | {k: v for k, v in headings.items() if any(row[k] is not None for row in rows)}
        notes = [f"95% intervals of CIDEr, by image: {', '.join(spans)}"]
        for why in dict.fromkeys(absent.values()):
            notes.append(f"{' and '.join(name for name in absent if absent[name] == why)} absent: {why}")
        made.append((f"{_NAMES[key[0]]}, {_NAMES[key[1]]}, {images} images", rows, columns, "; ".join(notes)))
    return made


def questions_in(found: dict, heading: str) -> str:
    """A heading of `tables`; of a dialogue it counts questions, several of an image."""
    return heading.replace("images", "questions") if "equal" in found else heading


def equal_table(found: dict) -> tuple[list[dict], dict]:
    """(rows, columns) of the shares of right answers that `train_vqa.score_chat` counts."""
    return found["equal"], {key: "" if key == "model" else key for key in found["equal"][0]}


def write_page(
    path, title: str, scores: dict, rows: list[dict], history: list[dict], picture, subtitle: str = ""
) -> None:
    """The page of a training run on texts: the tables of `scores`, {language: {"models": `compare`'s result, "prompt"}}, the
    curves of its `history`, and pictures with what was written (`report.caption_sections`), best and worst first."""
    sections = [
        (
            f"{found.get('prompt', '')} {questions_in(found, heading)}".strip(),
            report.table_html(listed, columns) + f"<p>{html.escape(notes)}</p>",
        )
        for found in scores.values()
        for heading, listed, columns, notes in tables(found["models"])
    ]
    for found in scores.values():
        if "equal" in found:
            sections.append(("Answers equal to the truth", report.table_html(*equal_table(found))))
    curves = {"loss": "training loss", "eval_loss": "held-out loss", "eval_CIDEr": "CIDEr"}
    sections += report.curves_section(history, curves) + report.caption_sections(rows, picture)
    report.page(title, sections, path, subtitle)


if __name__ == "__main__":
    _child(sys.argv[1])
