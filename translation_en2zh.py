"""Chinese chat rows from English captions: a language model merges or translates them, and every answer is checked.

    python translation_en2zh.py --input captions_en.json --output captions_zh.json \\
        --base_url http://127.0.0.1:8000/v1 --model qwen --prompt_file prompts/translate_zh.txt
    python translation_en2zh.py --input captions_en.json --output captions_zh.json --local Qwen/Qwen3-4B
    python translation_en2zh.py --input captions_both.json --output captions_zh.json --check     # clean the Chinese it has

--input is any caption file that train_caption.py reads. --output is a list of {"img", "prompt", "label"} with the `split`
of the input where it has one; `img` is the name the input uses where that finds the same image from the output's folder,
else an absolute path. Beside it stand `<output>.report.json` (counts), `<output>.rejected.jsonl` (what was put aside,
with the reasons) and `<output>.cache.jsonl` (every answer, written as it comes: a run that was stopped goes on from there
and pays again for at most what was under way).

Exit code: 0, or 1 where the server left captions without an answer (run the same command again), or 2 where nothing
was written.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import email.utils
import hashlib
import json
import os
import random
import re
import statistics
import sys
import time
import unicodedata
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from config import (
    SURROGATE,
    InputError,
    add_device_flags,
    flock,
    places_beside,
    read_lines,
    read_text,
    refuse_outside,
    user_errors,
)
from scenes import is_chinese, load_json, read_scenes

PROMPTS = Path(__file__).parent / "prompts"
PLACEHOLDERS = ("{captions}", "{glossary}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="captions, in any form train_caption.py reads")
    parser.add_argument("--output", required=True, help='file for [{"img", "prompt", "label"}] (.json or .jsonl)')
    parser.add_argument("--image_root", help="folder of the images (default: the input's folder, or its images/)")
    parser.add_argument(
        "--max_rejected",
        type=float,
        default=0.01,
        help="share of input rows that may be unusable (default: %(default)s)",
    )

    engine = parser.add_argument_group("who translates")
    engine.add_argument("--base_url", help="an OpenAI-compatible server: DeepSeek, Qwen, vLLM, transformers serve")
    engine.add_argument("--model", help="the model's name on that server")
    engine.add_argument("--api_key", help="default: the variable OPENAI_API_KEY; a server of your own needs none")
    engine.add_argument("--local", help="instead of a server: folder of a language model that runs here")
    engine.add_argument(
        "--check",
        action="store_true",
        help="instead of asking anyone: take the Chinese texts that the input has, and put the bad ones aside",
    )
    engine.add_argument(
        "--batch_size", type=int, default=8, help="captions that --local works on at once (default: %(default)s)"
    )
    add_device_flags(engine)
    engine.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0: the likeliest words; --local is always so (default: %(default)s)",
    )
    engine.add_argument(
        "--max_tokens", type=int, default=1024, help="longest answer, with a model's thinking (default: %(default)s)"
    )
    engine.add_argument("--extra", help='JSON to send along, e.g. {"chat_template_kwargs": {"enable_thinking": false}}')

    network = parser.add_argument_group("requests")
    network.add_argument("--concurrency", type=int, default=8, help="requests under way at once (default: %(default)s)")
    network.add_argument(
        "--requests_per_minute", type=float, default=0, help="at most so many (0: no limit) (default: %(default)s)"
    )
    network.add_argument("--timeout", type=float, default=120, help="seconds for one answer (default: %(default)s)")
    network.add_argument(
        "--retries", type=int, default=5, help="further tries of a request that failed (default: %(default)s)"
    )
    network.add_argument(
        "--backoff",
        type=float,
        default=1.0,
        help="seconds before the first retry; doubles each time (default: %(default)s)",
    )
    network.add_argument(
        "--max_wait",
        type=float,
        default=300,
        help="longest wait a server may ask for, in seconds (default: %(default)s)",
    )

    text = parser.add_argument_group("texts")
    mode = text.add_mutually_exclusive_group()
    mode.add_argument(
        "--merge", dest="mode", action="store_const", const="merge", help="one description of all captions of an image"
    )
    mode.add_argument("--each", dest="mode", action="store_const", const="each", help="every caption by itself")
    parser.set_defaults(mode="merge")
    text.add_argument("--prompt_file", default=str(PROMPTS / "translate_zh.txt"), help="has {captions} and {glossary}")
    text.add_argument("--questions_file", default=str(PROMPTS / "questions_zh.txt"), help="questions, one a line")
    text.add_argument(
        "--questions",
        type=int,
        help="rows, each with another question, of one description (default: 3; with --each 1; with --check the question that"
        " the file has for it)",
    )
    text.add_argument("--glossary", default=str(PROMPTS / "glossary_zh.json"), help="{English term: [Chinese terms]}")
    text.add_argument("--seed", type=int, default=0, help="another seed draws other questions (default: %(default)s)")
    text.add_argument(
        "--min_chars",
        type=int,
        default=6,
        help="a shorter text is refused (unless its caption is short) (default: %(default)s)",
    )
    text.add_argument(
        "--max_duplicates", type=int, default=3, help="images that may share one description (default: %(default)s)"
    )
    text.add_argument("--keep_duplicates", action="store_true", help="keep those that stay alike after asking again")
    return parser


# ----------------------------------------------------------------------------------------------------
# What the user gives


def checked(args) -> None:
    """Refuse what no run can use, before anything is read. Raises InputError."""
    if bool(args.base_url) + bool(args.local) + args.check != 1:
        raise InputError(
            "give --base_url (a server), --local (a model's folder) or --check (nobody is asked), one of them"
        )
    if args.check and (args.model or args.mode == "each"):
        raise InputError("--check asks nobody: it does not go with --model or --each")
    if args.base_url:
        try:
            url = urlsplit(args.base_url)
            whole = (
                url.scheme in ("http", "https")
                and url.hostname
                and url.port != 0
                and not re.search(r"\s", args.base_url)
            )
        except ValueError:  # a port above 65535, half of an IPv6 address
            whole = False
        if not whole:
            raise InputError(f"--base_url {args.base_url}: expected an address such as http://127.0.0.1:8000/v1")
        if not args.model:
            raise InputError("--base_url needs --model, the model's name on that server")
    args.api_key = args.api_key or os.environ.get("OPENAI_API_KEY") or "none"
    if not args.api_key.isascii() or not args.api_key.isprintable():
        raise InputError("--api_key: holds characters that no key has")
    refuse_outside(
        args, batch_size=(1, 4096), temperature=(0, 2), max_tokens=(1, 10**6), concurrency=(1, 1000),
        requests_per_minute=(0, 10**6), timeout=(0.001, 86400), retries=(0, 100), backoff=(0, 3600), max_wait=(0, 86400),
        questions=(1, 100), min_chars=(1, 1000), max_duplicates=(1, 10**9), max_rejected=(0, 1),
    )  # fmt: skip
    if args.extra:
        try:
            args.extra = json.loads(args.extra)
        except json.JSONDecodeError as error:
            raise InputError(f"--extra: not JSON: {error.msg} at character {error.pos}") from None
        if not isinstance(args.extra, dict):
            raise InputError("--extra: expected a JSON object")
        if args.extra.get("stream"):
            raise InputError("--extra: stream: answers are read whole, so a model that only streams cannot be asked")


def read_prompt(path: str) -> str:
    """The prompt with its two placeholders. Raises InputError naming the one that is missing."""
    text = read_text(path, "--prompt_file")
    for name in PLACEHOLDERS:
        if name not in text:
            raise InputError(f"--prompt_file {path}: the placeholder {name} is missing")
    return text.strip()


def read_questions(path: str) -> list[str]:
    return read_lines(path, "--questions_file", "question")


def read_glossary(path: str) -> dict[str, list[str]]:
    """{English term in lower case: accepted Chinese}. Raises InputError naming the term."""
    content = load_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected {{English term: [Chinese terms]}}, found {type(content).__name__}")
    for term, accepted in content.items():
        if not isinstance(accepted, list) or not accepted or not all(isinstance(a, str) and a for a in accepted):
            raise InputError(f"{path}: term {term!r}: expected a list of Chinese terms with at least one")
    return {term.lower(): accepted for term, accepted in content.items()}


def name_for(image: str, name: str, output: Path) -> str:
    """What `scenes.read_conversations` finds `image` by from the output's folder: its own name, else the path below that folder,
    which may be moved with it, else the absolute path."""
    for root in (output.parent, output.parent / "images"):
        if (root / name).is_file():
            if os.path.samefile(root / name, image):
                return name
            break
    path, folder = Path(os.path.abspath(image)), Path(os.path.abspath(output.parent))
    return path.relative_to(folder).as_posix() if folder in path.parents else str(path)


# ----------------------------------------------------------------------------------------------------
# Is an answer a faithful Chinese text? Every check returns [(reason, what to tell the model)].

SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WORDS = {word: i for i, word in enumerate(SMALL)} | {word: 20 + 10 * i for i, word in enumerate(TENS)}
TIMES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6}
ONE_WORD = rf"(?:(?:{'|'.join(TENS)})[- ](?:{'|'.join(SMALL[1:10])})|{'|'.join(reversed(WORDS))})\b"
ENGLISH_NUMBER = re.compile(  # 12, 80,000, 3 million; twenty-one, two hundred and fifty; many
    rf"(?<![\w.])(?:(?P<digits>\d[\d,]*(?:\.\d+)?)(?P<times>(?: (?:{'|'.join(TIMES)})\b)?)"
    rf"|(?P<words>{ONE_WORD}(?: (?:{'|'.join(TIMES)})\b(?:(?: and)? {ONE_WORD})?)*)"
    r"|(?P<vague>many|numerous|lots of|plenty of|several|a few|(?:dozens|hundreds|thousands) of)\b)"
)
FRACTION = re.compile(rf"\b(?:{'|'.join(SMALL[1:])})[- ](?:half|third|quarter|fourth|fifth|sixth|eighth|tenth)s?\b")
AND_A_HALF = re.compile(rf"\b({'|'.join(SMALL[1:10])}) and a half\b")
NOT_A_COUNT = re.compile(r"\b(?:this|that|another|each|any|every|which|no|the other|the)$")  # "another one", "each one"
PRONOUN = re.compile(r"\b(?:an?|the)(?: \w+){1,2}$")  # "a big plane and a small one"
NOUN_ENDS = re.compile(
    "of|in|on|at|near|next|with|and|or|are|is|was|were|to|by|from|along|beside|between|behind|around|that|which|has|have"
    "|there|this|it|surrounded|parked|arranged|located|lined|while|as|for|into|under|over|above|below"
)
IMPLIED = {2: r"\b(both|pair|couple|double|dual|twin|two|second)\b", 3: r"\b(triang|triple|tri-|three)",
           4: r"\b(square|four|corner|quadrup)", 5: r"\b(star\b|pentag|quintup)", 6: r"\b(half a dozen|hexag)", 8: r"\boctag",
           12: r"\bdozen", 100: r"\bhundred", 1000: r"\bthousand", 10: r"\b(cross|ten\b|intersect)"}  # fmt: skip
HALF = re.compile(r"\b(?:50|fifty)[- ]?(?:%|per ?cent)", re.IGNORECASE)
NUMBER_IN_WORDS = {  # Chinese for a number, without one
    "many": "[上成][百千万]|成[荫片]|多|大量|不少|无数|若干|成群|少量|少数|林立|遍布|覆盖|大片|些|[密茂满几数]",
    0: "[没无未]", 1: "[单独唯]", 2: "双|俩|一对|成对|一分为二", 6: "打", 12: "打",
}  # fmt: skip

DIGIT = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
UNIT = {"十": 10, "百": 100, "千": 1000, "万": 10000, "亿": 10**8}
NUMERAL = f"[{''.join(DIGIT)}十百千万]+"
CHINESE_NUMBER = re.compile(  # behind 几 and 数 (几十, 数百) it is no number but "many"
    rf"(?<![A-Za-z\d.第几数])(?:(?:\d+(?:,\d{{3}})+|\d+)(?:\.\d+)?[百千万亿]?|{NUMERAL})"
)
RANGE = re.compile(r"\s*[-–—~～至到或]\s*(?:\d+(?:\.\d+)?|[一二两三四五六七八九十百千万]+)")
NAMED = re.compile(
    r"\b(?!The|There|These|Those|About|Only|Some|All|At|In|On|Around|Over|Nearly)[A-Z][A-Za-z]*[ -](\d+)\b"
)
GRID = re.compile(r"\b(\d+) ?[x×] ?(\d+)\b")
CLASSIFIERS = set(
    "个架艘辆条栋座幢幅片块棵株排行列处所间家只头匹台部层级张面侧边旁岸端角段道股组群簇堆种类样些半起直口根支枝颗粒位名把"
    "扇顶丛簇团圈串束滴套批队对双号英码节户格畦具副瓣次年月日度米公厘毫亩平顷倍吨元分秒小时圆方点车跑泊轨线字体者大小长短整余多来几人%mkch"
)
IDIOM = re.compile(
    r"四面八方|四通八达|四四方方|十字|四[周面处方边角通]|两[侧边旁岸端者头]|两两|三三|三角|五颜六色|[五六八][边角]|七彩|百货|二手|三面|[两三四五六七]种颜色|第[一二三四五六七八九十]+"
)


def english_numbers(text: str) -> list[tuple[float | str, str]]:
    """[(value or "many", the noun it counts)] of one caption."""
    text, found = AND_A_HALF.sub(lambda m: f"{WORDS[m[1]]}.5", FRACTION.sub(" ", text.lower())), []
    for match in ENGLISH_NUMBER.finditer(text):
        # The 2nd, the 1990s, a four-way crossing.
        if re.match(r"(?:st|nd|rd|th|s)\b|-(?:way|leaf)\b", text[match.end() :]):
            continue
        if match["vague"]:
            value = "many"
        elif match["digits"]:
            value = float(match["digits"].rstrip(",").replace(",", "")) * TIMES.get(match["times"].strip(), 1)
        else:
            value = part = 0
            for word in re.findall("[a-z]+", match["words"]):
                if word in ("thousand", "million"):
                    value, part = value + part * TIMES[word], 0
                elif word in TIMES:
                    part *= TIMES[word]
                else:
                    part += WORDS.get(word, 0)
            value += part
        after = re.sub("^ (?:different |various )*(?:kinds|types|sizes|sorts) of", "", text[match.end() :])
        if value == 1 and (NOT_A_COUNT.search(text[: match.start()].rstrip()) or re.match(r" (another|by one)", after)):
            continue
        words = []
        for word in re.match(r"[\w\s'-]*", after)[0].split()[:4]:
            if NOUN_ENDS.fullmatch(word):
                break
            words.append(word)
        if value == 1 and match["words"] and not words and PRONOUN.search(text[: match.start()].rstrip()):
            continue
        noun = next((word for word in words if word.endswith("s")), words[-1] if words else "")
        found.append((value, noun.rstrip("s")))
    return found


def numeral(token: str) -> float:
    """The value of 二十, 一百五十万."""
    total = section = last = 0
    for c in token:
        if c in DIGIT:
            last = DIGIT[c]
        elif c == "万":
            total, section, last = (total + section + last or 1) * 10000, 0, 0
        else:
            section, last = section + (last or 1) * UNIT[c], 0
    return float(total + section + last)


def chinese_numbers(text: str) -> list[tuple[set[float], bool, bool]]:
    """[(values it may stand for, is a classifier or unit behind it, is it only about so many)] of a Chinese text."""
    text, found = text.replace("千米", "公里").replace("平方", "平"), []
    text = re.sub("十分(?!之|钟|米)", "很", text).replace("一些", "些")
    text = re.sub(  # 三点五米, 百分之三十; a fraction (三分之二) is no count
        f"({NUMERAL})点([{''.join(DIGIT)}]+)",
        lambda m: f"{numeral(m[1]):g}.{''.join(str(DIGIT[c]) for c in m[2])}", text,
    )  # fmt: skip
    text = re.sub(rf"百分之(?:({NUMERAL})|([\d.]+))", lambda m: f"{numeral(m[1]):g}%" if m[1] else f"{m[2]}%", text)
    text = re.sub(rf"(?:{NUMERAL}|\d+)(?:分之(?:{NUMERAL}|\d+)|世纪|年代)", "", text)
    for match in CHINESE_NUMBER.finditer(text):
        token, more = match[0], RANGE.match(text, match.end())
        counted = re.search(r"(?:数量?|数目|总数|数字|编号|号码)[为是：:]?$", text[: match.start()]) is not None
        after = text[more.end() if more else match.end() :].lstrip()[:1]
        nearly = text[: match.start()].endswith(("近", "约"))
        if token[0] in "百千万" and not nearly:  # 百货, 千...: no count of its own
            continue
        if token[0].isdigit():
            values = {float(token.rstrip("百千万亿").replace(",", "")) * UNIT.get(token[-1], 1)}
        elif re.fullmatch("[一二两三四五六七八九]{2}[十百千万]", token):  # 二三十: twenty to thirty
            values = {numeral(digit + token[-1]) for digit in token[:-1]}
        elif len(token) > 1 and all(c in DIGIT for c in token):  # 两三: two or three; 二〇二五: a year
            values = {float(DIGIT[c]) for c in token} | {float("".join(str(DIGIT[c]) for c in token))}
        else:
            values = {numeral(token)}
        about = len(values) > 1 or after in ("几", "多", "余", "来") or token[0] in "百千万"
        if token == "十" and after == "几":
            values = {float(n) for n in range(11, 20)}
        found.append((values, counted or (after in CLASSIFIERS and after != ""), about))
    return found


def wanted_numbers(captions: list[str]) -> list[set]:
    """One set of values for each number that must be there; any of a set will do. Captions of one image that count the
    same thing differently ("two planes", "several planes") leave the choice."""
    by_noun: dict[str, list[set]] = {}
    for caption in captions:
        mine: dict[str, set] = {}
        for value, noun in english_numbers(caption):
            mine.setdefault(noun, set()).add(value)
        for noun, values in mine.items():
            by_noun.setdefault(noun, []).append(values)
    wanted = []
    for sets in by_noun.values():
        if all(values == sets[0] for values in sets):
            wanted += [{value} for value in sets[0]]
        else:
            wanted.append(set().union(*sets))
    return wanted


def shown(value) -> str:
    return "许多" if value == "many" else f"{value:g}"


def check_numbers(captions: list[str], text: str) -> list[tuple[str, str]]:
    found, wrong = chinese_numbers(text), []
    names = {float(number) for caption in captions for number in NAMED.findall(caption)}  # Boeing 747, Terminal 3
    names |= {float(number) for caption in captions for number in re.findall(r"\b[A-Z][a-z]+ \d+-(\d+)\b", caption)}
    names |= {float(number) for caption in captions for pair in GRID.findall(caption) for number in pair}
    for wanted in wanted_numbers(captions):
        named = "或".join(shown(value) for value in sorted(wanted, key=str))
        if any(value in wanted and re.search(words, text) for value, words in NUMBER_IN_WORDS.items()):
            continue
        if 50 in wanted and re.search("一半|半数", text) and HALF.search(" ".join(captions)):
            continue
        at = [good for values, good, _ in found if values & wanted]
        if not at:
            wrong.append(("number missing", f"缺少数量{named}"))
        elif not any(at) and not wanted & names:
            wrong.append(("number without a classifier", f"数字{named}后面缺少量词"))
    known = {value for caption in captions for value, _ in english_numbers(caption)}
    english = " ".join(captions).lower()
    known |= {value for value, pattern in IMPLIED.items() if re.search(pattern, english)}
    for values, good, about in chinese_numbers(IDIOM.sub("", text)):
        # 一 is also the Chinese article, and "about so many" may stand for many.
        if good and 1 not in values and not values & known and not (about and "many" in known):
            wrong.append(("number added", f"原文没有数量{shown(min(values))}"))
    return wrong


CENTRES = (
    "shopping", "sports", "convention", "exhibition", "conference", "business", "commercial", "community", "medical", "visitor",
    "data",
)  # fmt: skip
DIRECTIONS = {
    "northeast": ("东北|北东|东偏北|北偏东", r"north-?\s?east\w*"),
    "northwest": ("西北|北西|西偏北|北偏西", r"north-?\s?west\w*"),
    "southeast": ("东南|南东|东偏南|南偏东", r"south-?\s?east\w*"),
    "southwest": ("西南|南西|西偏南|南偏西", r"south-?\s?west\w*"),
    "north": ("北", r"north\w*"), "south": ("南", r"south\w*"), "east": ("东", r"east\w*"), "west": ("西", r"west\w*"),
    "centre": ("中央|中[心间部段轴线]|[正居当海湖河水林田]中|央|之间",
               "".join(rf"(?<!{kind} )" for kind in CENTRES) + r"cent(?:er|re|ers|res|ral)|middle"),
    "left": ("左", r"(?:(?<=the )|(?<=upper )|(?<=lower )|(?<=top )|(?<=bottom ))left\w*"
             r"|(?<!is )(?<!are )(?<!was )(?<!were )left(?! over| behind| empty| by| for\b| an?\b| some\b| its\b| trac)\w*"),
    "right": ("右", r"right(?! next| beside| behind|[ -]angled?| now| at| by| in the| above| below)(?:most|-hand)?"),
    "top": ("上|顶", r"(?:top|upper)(?![- ](?:view|down))\w*"), "bottom": ("下|底", r"(?:bottom|lower)\w*"),
}  # fmt: skip
LETTER_OF = {"东": "east", "西": "west", "南": "south", "北": "north", "左": "left", "右": "right"}


PLACES = (  # that hold a direction's character
    "北京|北海道|南京|南昌|南宁|南通|南极|北极|西安|西宁|西藏|西雅图|西班牙|西伯利亚|东京|东莞|广东|广西|陕西|云南|济南|越南|巴西|墨西哥|新西兰|密西西比|马来西亚"
    "|(?:河南|河北|湖南|湖北|海南|山东|山西|江西)(?=省)"
)
PROVINCES = {"河南": "henan", "河北": "hebei", "湖南": "hunan", "湖北": "hubei", "海南": "hainan", "山东": "shandong",
             "山西": "shanxi", "江西": "jiangxi"}  # fmt: skip


def check_directions(captions: list[str], text: str) -> list[tuple[str, str]]:
    compass = {"N": "north", "S": "south", "E": "east", "W": "west"}
    english = re.sub(r"\b([NS])([EW])\b", lambda m: compass[m[1]] + compass[m[2]], " ".join(captions)).lower()
    masked, wrong = english, []  # "northeast" is found before its parts
    for name, (accepted, pattern) in DIRECTIONS.items():
        masked, times = re.subn(rf"\b(?:{pattern})\b", " ", masked)
        if times and not re.search(accepted, text):
            wrong.append(("direction missing", f"缺少方位“{accepted.split('|')[0]}”（{name}）"))
    named = "".join(f"|{name}" for name, pinyin in PROVINCES.items() if pinyin in english)
    rest = re.sub(f"东西(?![侧部边方面端向两走])|左右|[西南冬]瓜|{PLACES}{named}", "", text)
    for letter, name in LETTER_OF.items():
        if letter in rest and not re.search(
            rf"\b(?:(?:north|south|mid)[- ]?)?{name}", english
        ):  # "at least" is not east
            wrong.append(("direction added", f"原文没有方位“{letter}”"))
    return wrong


COLOURS = {
    "red": "红|赤", "orange": "橙|橘", "yellow": "黄", "green": "绿|青|翠|碧", "blue": "蓝|碧", "purple": "紫", "pink": "粉",
    "brown": "棕|褐|咖啡|茶色", "grey": "灰", "gray": "灰", "black": "黑", "white": "白", "silver": "银", "golden": "金",
    "beige": "米|浅黄|卡其", "turquoise": "青|绿|碧|蓝",
}  # fmt: skip
COLOUR_OF = {  # what an English text must say for a Chinese one to name the colour
    "红": "red|pink|maroon|crimson|brick|brown", "橙": "orange",
    "黄": "yellow|gold|beige|tan|sand|khaki|brown|orange|wither|straw|dry|dried",
    "绿": r"green|evergreen|lush|verdant|grass|lawn|meadow|vegetat|tree|\w*forest|plant|turquoise|emerald|crop|farm"
          r"|\w*field|park|teal",
    "蓝": "blue|azure|cyan|turquoise|navy|teal", "紫": "purple|violet", "粉": "pink", "棕": "brown|tan",
    "褐": "brown|tan|maroon|chestnut|rust",
    "灰": "gr[ae]y|ash|silver|concrete|cement|dark", "黑": "black|dark", "白": "white|snow|pale|bright|light|cream|ivory|beige",
}  # fmt: skip
COLOUR_IDIOM = re.compile(
    "绿[化地植洲篱荫野林道]|黄[土沙昏河金]|蓝天|白[天云]|红绿灯|黑夜|灰尘|粉末|橙子|棕榈|红树林|白[桦杨]|空白|裸露黄土|金黄|粉刷|赤道"
)


def check_colours(captions: list[str], text: str) -> list[tuple[str, str]]:
    english, wrong = " ".join(captions).lower(), []
    for name, accepted in COLOURS.items():
        if re.search(rf"\b{name}(?:d?ish)?\b(?! house\b)", english) and not re.search(accepted, text):
            wrong.append(("colour missing", f"缺少颜色“{accepted.split('|')[0]}”（{name}）"))
    rest = COLOUR_IDIOM.sub("", text)
    for letter, said in COLOUR_OF.items():
        if letter in rest and not re.search(rf"\b(?:{said})", english):  # "covered" is not red
            wrong.append(("colour added", f"原文没有颜色“{letter}”"))
    return wrong


def terms_in(captions: list[str], glossary: dict[str, list[str]]) -> dict[str, list[str]]:
    """Terms of the glossary that the captions use, the longest first: "storage tank" is no "tank"."""
    english, found = " ".join(captions).lower(), {}
    for term in sorted(glossary, key=lambda term: (-len(term), term)):
        stem, plural = (
            (term[:-1], "(?:y|ies)") if term[-1:] == "y" and term[-2:-1] not in "aeiou" else (term, "(?:s|es)?")
        )
        if stem not in english:  # most are not: a hundred searches a caption take a millisecond
            continue
        english, times = re.subn(rf"\b{re.escape(stem)}{plural}\b", " ", english)
        if times:
            found[term] = glossary[term]
    return found


DENIED = re.compile(r"\b(?:no|without|0|zero)(?: any)? (\w+)")
OTHER_DENIAL = re.compile(
    r"\b(?:not|none|never|nothing|neither|without|hardly|empty|few|free of|lack\w*|absen\w+|devoid)\b|n't\b"
)
PLAIN = "了?(?:(?:任何|[大小新旧长高][型的]?|[红橙黄绿蓝紫粉棕褐黑白灰]色?)的)?"  # "no red ship", not "land that has no trees"
STREAMS = re.compile(r"\bstreams?(?= (?:along|past|through|down|by|into)\b)")  # traffic does


def check_glossary(captions: list[str], text: str, glossary: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Are the terms of the captions translated as the glossary has it, and is nothing there that they say is not?"""
    captions = [STREAMS.sub(" ", caption.lower()) for caption in captions]
    # What is not there may be left out of a description.
    said = terms_in([DENIED.sub(" ", caption) for caption in captions], glossary)
    denied = terms_in([noun for caption in captions for noun in DENIED.findall(caption)], glossary)
    wrong = [
        ("glossary", f"“{term}”应译为{'或'.join(accepted)}")
        for term, accepted in said.items()
        if not any(one in text for one in accepted)
    ]
    if not OTHER_DENIAL.search(" ".join(captions)):
        parts = re.split("[,.;:!?，。；：！？、]", text)
        for term, accepted in said.items():
            at = [part for part in parts if any(one in part for one in accepted)]
            one_of = "|".join(map(re.escape, accepted))
            if (
                at
                and term not in denied
                and all(re.search(f"(?<![淹沉埋吞])没有?{PLAIN}[^的了]{{0,4}}?(?:{one_of})", part) for part in at)
            ):
                wrong.append(("negation added", f"原文没有说没有{accepted[0]}（{term}）"))
    for accepted in sorted((one for several in said.values() for one in several), key=len, reverse=True):
        text = text.replace(accepted, " ")  # a car park is no car
    clauses = [clause for clause in re.split("[,.;:!?，。；：！？、]", text) if not re.search("[没无未不非]", clause)]
    return wrong + [
        ("negation lost", f"原文说没有{accepted[0]}（{term}）")
        for term, accepted in denied.items()
        if term not in said and any(one in clause for clause in clauses for one in accepted)
    ]


MAY_STAY = re.compile(
    r"[A-Za-z]|[kcmdn]?m2?|km2|ha|px|pixels?|RGB|GPS|GSD|UAV|SAR|NDVI|NIR|SWIR|DEM|DSM|GIS|LED|ATM|ETC|Landsat|Sentinel|LiDAR"
)


OTHER_SCRIPT = re.compile(  # Cyrillic, Hebrew, Arabic, Indic and Thai, kana, Hangul, emoji
    "[\u0400-\u052f\u0590-\u07ff\u0900-\u0eff\u3040-\u30ff\uac00-\ud7af\U0001f000-\U0001faff]"
)


ON_BOTH_SIDES = "瞭鄠崀栟塱滘垚昇祐珮堃"  # of Big5 and not of GB 2312, and yet written on the mainland: 瞭望塔


def _traditional(character: str) -> bool:
    """Of Taiwan's character set (Big5) and not of the mainland's (GB 2312): 機."""
    if character in ON_BOTH_SIDES or not "\u4e00" <= character <= "\u9fff":
        return False
    return bool(character.encode("big5", "ignore")) and not character.encode("gb2312", "ignore")


def check_language(captions: list[str], text: str) -> list[tuple[str, str]]:
    if not is_chinese(text):
        return [("not Chinese", "回答不是中文")]
    if traditional := next(filter(_traditional, text), None):
        return [("traditional characters", f"请用简体中文，不用“{traditional}”")]
    if OTHER_SCRIPT.search(text):
        return [("another script", f"回答里有中文以外的文字“{OTHER_SCRIPT.search(text)[0]}”")]
    capitals = set(
        re.findall(r"\b[A-Z][A-Z\d]+\b|\b[A-Z][a-z]+(?=[ -][A-Z]?\d)", " ".join(captions))
    )  # UAV; Boeing 747
    letters = unicodedata.normalize("NFKC", text)  # of whatever width
    left = [
        word for word in re.findall(r"[A-Za-z]+\d*", letters) if not MAY_STAY.fullmatch(word) and word not in capitals
    ]
    return [("English left", f"还有英文“{left[0]}”")] if left else []


REFUSAL = re.compile(
    r"抱歉|对不起|作为(?:一个|一名|一款)?(?:AI|人工智能|语言模型|大模型)|(?:我|暂时|目前)无法|看不到图|无法(?:翻译|提供|完成|查看|描述|回答|处理)"
    r"|不能(?:翻译|提供|完成)|as an? (?:AI|language model)|\bI(?:'m| am) sorry|\bI can(?:no|')t|unable to",
    re.IGNORECASE,
)
META = re.compile(
    r"以下(?:是|为)|翻译(?:如下|结果|为)|译文|翻译[:：]|(?:描述|合并|结果)(?:如下|为)?[:：]|合并后|^(?:中文|输出|回答|答|标题)\s*[:：]|^好的|^当然|根据(?:您|你|以上|上述|提供|给出|这)"
    r"|已合并|已?按照?您|一段(?:中文)?描述|希望(?:这|对)|请提供|术语表|注[:：]|(?:原文|英文)(?:描述|中|为)"
    r"|如有(?:需要|疑问)|请告诉我|```|\*\*|^#|^[-*•·【]|^\d+[.、)](?!\d)|here (?:is|are)|translation",
    re.IGNORECASE,
)


REPEATED = re.compile(r"([\u4e00-\u9fff]{2,12}?)\1{3}")
LONGEST = 20_000  # characters of an answer that is looked at


def check_form(captions: list[str], text: str, min_chars: int) -> list[tuple[str, str]]:
    wrong = []
    if REFUSAL.search(text):
        wrong.append(("refusal", "回答拒绝了翻译，请直接给出中文描述"))
    if re.search(r"</?\w[^<>]*>|\\|##|^/|[（(](?:完|全文完)[）)]$", text):
        wrong.append(("markup", "回答里有标记，只输出文字"))
    if META.search(text):
        wrong.append(("meta talk", "回答里有描述以外的话，只输出描述本身"))
    if "\ufffd" in text:
        wrong.append(("broken characters", "回答里有乱码"))
    sentences = [part for part in re.split("[。！？；;!?]", text) if len(part) > 5]
    if len(set(sentences)) < len(sentences) or REPEATED.search(text):
        wrong.append(("repetition", "回答重复了同样的话"))
    size = len(re.findall(r"[\u4e00-\u9fff\d]", text))
    if not captions:
        return [*wrong, ("too short", "回答太短，请写全所有内容")] if size < min_chars else wrong
    letters = [len(re.sub(r"[^A-Za-z\d]", "", caption)) for caption in captions]
    # A Chinese text has about a third of the letters of the English one; "a river" is 一条河.
    if size < max(min(min_chars, max(letters) / 8), 0.12 * max(letters)):
        wrong.append(("too short", "回答太短，请写全所有内容"))
    if size > sum(letters) + 60:
        wrong.append(("too long", "回答太长或有重复，请写得简洁"))
    return wrong


def check(captions: list[str], text: str, glossary: dict[str, list[str]], min_chars: int = 6) -> list[tuple[str, str]]:
    """What is wrong with a Chinese text of these captions: [(reason, what to tell the model)]. Without captions only the
    text's form and language are judged."""
    if len(text) > LONGEST:
        return [("too long", "回答太长或有重复，请写得简洁")]
    wrong = check_form(captions, text, min_chars)
    if any(reason in ("refusal", "meta talk") for reason, _ in wrong):
        return wrong  # a refusal has lost the numbers too: one reason says it better than ten
    language = check_language(captions, text)
    if language and language[0][0] == "not Chinese":
        return language
    if not captions:
        return [*wrong, *language]
    text = unicodedata.normalize("NFKC", text)
    return [
        *wrong,
        *language,
        *check_numbers(captions, text),
        *check_directions(captions, text),
        *check_colours(captions, text),
        *check_glossary(captions, text, glossary),
    ]


# What one of several texts of an image may leave to the others.
LACKING = {"number missing", "direction missing", "colour missing", "glossary", "too short"}


INVISIBLE = re.compile(f"{SURROGATE.pattern}|[\u00ad\u200b-\u200f\u2060\ufeff]")


def clean(answer: str) -> str:
    """An answer without a model's thinking, line breaks and quotes around it."""
    text = re.sub(r"<think>(?:(?!<think>).)*?</think>", "", INVISIBLE.sub("", answer), flags=re.DOTALL)
    text = text.rsplit("</think>", 1)[-1].strip()
    if "<think>" in text:  # the thinking did not end within --max_tokens
        return ""
    text = text.replace("\\n", "\n").replace('\\"', '"').strip()  # JSON's escapes, in an answer that is no JSON
    text = re.sub(r"\s*\n\s*", "", text)
    for pair in ("“”", '""', "「」", "''", "‘’", "『』", "《》", "（）", "()"):
        if len(text) > 1 and text[0] == pair[0] and text[-1] == pair[1] and not set(pair) & set(text[1:-1]):
            text = text[1:-1].strip()
    return text


def plain(text: str) -> str:
    """A text as it counts for likeness: no punctuation, no spaces, one form of two."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", text)).replace("二", "两")


FACTS = re.compile(r"[\d零〇两三四五六七八九十百千万东西南北左右上下红橙黄绿蓝紫粉棕褐灰黑白没无不]")


class Groups:
    """Numbers texts so that those which say the same in nearly the same words have one number.

    Alike are texts with the same numbers, directions, colours and negations in the same order, whose sets of three neighbouring
    characters have a Jaccard similarity of at least `LIKENESS`. A text joins the first group whose first text it is like, so
    that the numbers depend on the order of asking.
    """

    LIKENESS = 0.8

    def __init__(self):
        self.known: dict[str, int] = {}
        self.count = 0
        self.firsts: dict[tuple, tuple[list[int], array, dict[str, array]]] = {}
        """facts -> of the first texts with these facts (their groups, how many parts each has, {part: which of them have it})"""

    @staticmethod
    def parts(text: str) -> set[str]:
        return {text[i : i + 3] for i in range(max(1, len(text) - 2))}

    def of(self, text: str) -> int:
        text = plain(text)
        if text not in self.known:
            parts, facts = self.parts(text), tuple(FACTS.findall(text))
            groups, sizes, having = self.firsts.setdefault(facts, ([], array("i"), {}))
            alike = self._alike(parts, sizes, having)
            self.known[text] = groups[alike[0]] if len(alike) else self.count
            if not len(alike):
                for part in parts:
                    having.setdefault(part, array("i")).append(len(groups))
                groups.append(self.count)
                sizes.append(len(parts))
                self.count += 1
        return self.known[text]

    def _alike(self, parts: set[str], sizes: array, having: dict[str, array]) -> np.ndarray:
        """Which first texts these parts are like. Compared with all at once: a template's texts have most parts in common."""
        found = [np.frombuffer(having[part], np.intc) for part in parts if part in having]
        if len(found) < self.LIKENESS * len(parts):  # not even a text that had all of these
            return np.empty(0, np.intp)
        shared = np.bincount(np.concatenate(found), minlength=len(sizes))
        return np.flatnonzero(shared >= self.LIKENESS * (len(parts) + np.array(sizes) - shared))


# ----------------------------------------------------------------------------------------------------
# Answers on disk


@dataclass
class Answer:
    text: str
    cut: bool = False
    """The model ran into its longest answer."""
    filtered: bool = False
    """A filter of the server stopped it."""
    limit: int = 0
    """The longest answer, --max_tokens, that was allowed: with more, one that was cut is asked for again."""


class Cache:
    """Append-only JSON lines of a key and its `Answer`, each on the disk before the next request takes its place.

    A line that a kill left half-written is ignored. Raises InputError where the file cannot be read or written, or where
    another run holds it.
    """

    def __init__(self, path: Path):
        self.path, self.answers = path, {}
        try:
            self.file = open(path, "ab+")  # noqa: SIM115  it stays open for the whole run
            flock(self.file)
            self.file.seek(0)
            content = self.file.read()
        except BlockingIOError:
            raise InputError(
                f"{path}: another run writes this output; wait for it or choose another --output"
            ) from None
        except OSError as error:
            raise InputError(f"{path}: cannot be opened: {error.strerror}") from None
        for line in content.split(b"\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                self.answers[row["key"]] = Answer(
                    row["text"], row["cut"], row.get("filtered", False), row.get("limit", 0)
                )
        self.ragged = not content.endswith(b"\n") and content != b""

    def add(self, key: str, answer: Answer) -> None:
        row = {"key": key} | dataclasses.asdict(answer)
        line = json.dumps(row).encode() + b"\n"
        try:
            self.file.write(b"\n" + line if self.ragged else line)
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from None
        self.ragged = False
        self.answers[key] = answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if not self.path.stat().st_size:  # a run that could not begin leaves nothing behind
                self.path.unlink()
            self.file.close()


# ----------------------------------------------------------------------------------------------------
# Engines: `ask([(key, messages)], keep)` calls `keep(key, Answer)` as answers come and returns {key: why there is none}


class Retry(Exception):
    """A request that may succeed when it is sent again."""

    def __init__(self, cause: str, message: str, wait: float | None = None):
        super().__init__(message)
        self.cause, self.wait = cause, wait


class Refused(Exception):
    """The server does not take this one request."""


def wait_asked(headers) -> float | None:
    """Seconds of a Retry-After header, as a number or as a date; None without one."""
    given = headers.get("retry-after", "")
    try:
        return max(0.0, float(given))
    except ValueError:
        with contextlib.suppress(TypeError, ValueError):
            return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    return None


HEAVIEST = 4 << 20  # bytes of an answer; the thinking of a model with 100,000 tokens is a tenth of it


# What servers say where a model's answer is not what ended it: OpenAI, DeepSeek, vLLM, Zhipu.
FILTERED = {"content_filter", "sensitive"}
BROKEN_OFF = {"insufficient_system_resource", "abort", "error", "network_error"}


def answer_in(body: str) -> Answer:
    """The answer in the body of a chat completion. Raises Retry: malformed, empty, broken off."""
    try:
        choices = json.loads(body)["choices"]
        if not choices:
            raise Retry("empty answer", "the list of choices is empty")
        said, why = choices[0]["message"], choices[0].get("finish_reason")
        text = said["content"] or said.get("refusal")  # which takes the content's place
        if isinstance(text, list):  # parts, as Mistral's models that think send: their thinking has another type
            text = "".join(part["text"] for part in text if part.get("type", "text") == "text")
        if not (text is None or isinstance(text, str)) or SURROGATE.search(text or ""):  # an escape cut in half
            raise TypeError
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise Retry("malformed body", f"not a chat completion: {body[:80]!r}") from None
    if why in BROKEN_OFF:
        raise Retry("broken off", f"the server broke the answer off ({why})")
    answer = Answer(text or "", cut=why == "length", filtered=why in FILTERED)
    if not answer.text.strip() and not (answer.cut or answer.filtered):  # those would be so again
        raise Retry("empty answer", "the answer is empty")
    return answer


class Endpoint:
    """An OpenAI-compatible server, asked by `concurrency` workers."""

    def __init__(self, args):
        self.args, self.name = args, args.model
        self.sampling = {"temperature": args.temperature, "extra": args.extra}
        self.requests, self.retries = 0, Counter()
        self.answered = False  # now or in an earlier run: then one captions' failure does not speak for the server
        self.limit = "max_tokens"  # newer models of OpenAI's call it max_completion_tokens
        self.refused_in_a_row = self.failed_in_a_row = self.spent_in_a_row = 0
        self.next_start = self.paused_until = 0.0
        self.dice = random.Random()  # waits only: nothing that is written depends on it

    def ask(self, jobs: list[tuple[str, list[dict]]], keep) -> dict[str, str]:
        return asyncio.run(self._ask(jobs, keep))

    async def _ask(self, jobs, keep) -> dict[str, str]:
        try:
            import openai
        except ImportError:
            raise InputError("--base_url needs the package openai: pip install openai") from None

        # A proxy of the environment cannot reach a server on this machine. Every step of a redirection is a request.
        here = urlsplit(self.args.base_url).hostname in ("localhost", "127.0.0.1", "::1")
        client = openai.AsyncOpenAI(
            api_key=self.args.api_key, base_url=self.args.base_url, timeout=self.args.timeout, max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not here, max_redirects=2),
        )  # fmt: skip
        failures: dict[str, str] = {}
        waiting = iter(jobs)

        async def work():
            for key, messages in waiting:
                try:
                    answer = await self._answer(client, messages)
                    keep(key, answer)
                    self.spent_in_a_row = self.spent_in_a_row + 1 if answer.cut and not clean(answer.text) else 0
                    if self.spent_in_a_row >= (2 * self.args.concurrency + 5 if self.answered else 5):
                        raise InputError(f"{self.args.base_url}: every answer {spent(self.args.max_tokens)}")
                    self.failed_in_a_row = self.refused_in_a_row = 0
                    self.answered = self.answered or not self.spent_in_a_row
                except Refused as error:
                    failures[key] = str(error)
                    self.refused_in_a_row += 1
                    if self.refused_in_a_row >= (2 * self.args.concurrency + 5 if self.answered else 5):
                        thinks = "enable_thinking" in str(error)  # Qwen's own service, where an answer is not streamed
                        setting = '{"enable_thinking": false}' if thinks else '{"temperature": null}'
                        does = "that it asks for may be given" if thinks else "that it does not take may be left out"
                        hint = f"; a setting {does}: --extra '{setting}'"
                        raise InputError(f"{self.args.base_url}: refuses every request: {error}{hint}") from None
                except Retry as error:
                    failures[key] = str(error)
                    self.failed_in_a_row += 1
                    if not self.answered or self.failed_in_a_row > 2 * self.args.concurrency:
                        raise InputError(
                            f"{self.args.base_url}: no answer after {self.args.retries + 1} tries: {error};"
                            " answers so far are kept, run the same command again to go on"
                        ) from None

        async with client:
            workers = [asyncio.create_task(work()) for _ in range(min(self.args.concurrency, len(jobs)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return failures

    async def _answer(self, client, messages: list[dict]) -> Answer:
        for attempt in range(self.args.retries + 1):
            await self._turn()
            self.requests += 1
            try:
                return await self._request(client, messages)
            except Retry as error:
                if attempt == self.args.retries:
                    raise
                self.retries[error.cause] += 1
                if error.wait is not None and error.wait > self.args.max_wait:
                    raise InputError(
                        f"{self.args.base_url}: asks to wait {error.wait:.0f} s (allowed: --max_wait"
                        f" {self.args.max_wait:g}): {error}; answers so far are kept, run the same command again later"
                    ) from None
                wait = min(60.0, self.args.backoff * 2**attempt) * self.dice.uniform(0.5, 1.0)
                if error.wait is not None:  # the limit is on the key, so all workers hold
                    self.paused_until = max(self.paused_until, time.monotonic() + error.wait)
                    wait = error.wait + self.dice.uniform(0, 0.1) * min(1.0, wait)
                await asyncio.sleep(wait)

    async def _turn(self) -> None:
        """Wait for a pause of the server and for --requests_per_minute."""
        while (left := self.paused_until - time.monotonic()) > 0:
            await asyncio.sleep(left)
        if self.args.requests_per_minute:
            now = time.monotonic()
            start = max(now, self.next_start)
            self.next_start = start + 60 / self.args.requests_per_minute
            await asyncio.sleep(start - now)

    async def _request(self, client, messages: list[dict]) -> Answer:
        """One try. Raises Retry, Refused, or InputError where the run has to stop."""
        import openai

        settings = {"temperature": self.args.temperature, self.limit: self.args.max_tokens} | (self.args.extra or {})
        asked = client.chat.completions.with_raw_response.create(
            model=self.name, messages=messages,
            extra_body={name: value for name, value in settings.items() if value is not None},
        )  # fmt: skip
        try:
            # The client's own limit is on the silence between two pieces: a server that drips would hold it for ever.
            response = await asyncio.wait_for(asked, self.args.timeout)
            if len(response.content) > HEAVIEST:
                raise Retry("malformed body", f"an answer of {len(response.content) / 2**20:.0f} MiB")
            try:
                return answer_in(response.text)
            except Retry as error:  # a proxy may send the request's headers back
                shown = str(error) if self._masked(response.text) == response.text else "not shown: it holds the key"
                raise Retry(error.cause, shown) from None
        except (openai.APITimeoutError, asyncio.TimeoutError):
            raise Retry("timeout", f"no answer within {self.args.timeout:g} s") from None
        except openai.APIStatusError as error:
            unknown = error.status_code == 400 and "max_completion_tokens" in str(error.message)
            if unknown and "max_completion_tokens" not in settings:
                self.limit = "max_completion_tokens"
                return await self._request(client, messages)
            self._raise_for(error)
        except (openai.APIConnectionError, OSError) as error:
            raise Retry("connection", f"connection failed ({error.__cause__ or error})") from None
        except (openai.OpenAIError, ValueError) as error:
            raise Retry("malformed body", one_line(error)) from None

    def _masked(self, text: str) -> str:
        """`text` without the key, which a server or a proxy may send back; before anything is cut off it."""
        return text if self.args.api_key == "none" else text.replace(self.args.api_key, "***")

    def _raise_for(self, error) -> None:
        status = error.status_code
        said = f"HTTP {status}: {one_line(self._masked(error.message))}"
        where = f"{self.args.base_url}: {said}"
        if status in (401, 402, 403):
            raise InputError(f"{where}; check --api_key (OPENAI_API_KEY) and what the account may use") from None
        if status == 429 and error.code == "insufficient_quota":
            raise InputError(f"{where}; the account has no quota left") from None
        if status in (404, 405):
            raise InputError(f"{where}; check --base_url (it often ends in /v1) and --model {self.name}") from None
        if status in (408, 409, 425, 429) or status >= 500:
            cause = "429" if status == 429 else "timeout" if status == 408 else "5xx" if status >= 500 else str(status)
            raise Retry(cause, said, wait_asked(error.response.headers)) from None
        raise Refused(f"request refused: {said}") from None


def spent(max_tokens: int) -> str:
    return (
        f"was cut at --max_tokens {max_tokens} before its first word, as of a model that thinks: give more, or turn its thinking"
        """ off where the server can: --extra '{"chat_template_kwargs": {"enable_thinking": false}}'"""
    )


def one_line(error) -> str:
    return " ".join(str(error).split())[:200]


class Local:
    """A language model of a folder, greedy, batch by batch."""

    def __init__(self, args):
        from transformers import GenerationConfig
        from transformers.utils import logging

        from model import base_folder, end_tokens, fingerprint, load_language, pick_device

        logging.disable_progress_bar()
        folder = base_folder(args.local)
        device, dtype = pick_device(args.device, args.dtype)
        self.args, self.requests, self.retries = args, 0, Counter()
        self.model, self.tokenizer = load_language(folder, dtype)
        self.model.set_attn_implementation("sdpa")  # nothing is packed here
        self.model.to(device).eval()
        self.tokenizer.padding_side = "left"
        # Not the base's own: Qwen2.5's brings a repetition penalty, under which the likeliest word is another.
        self.model.generation_config = GenerationConfig(
            eos_token_id=end_tokens(self.model, self.tokenizer), pad_token_id=self.tokenizer.pad_token_id
        )
        self.name = f"{args.local} {fingerprint(folder)}"
        self.sampling = {"greedy": True}  # answers of before, under a base's penalty, are not taken from the cache

    def text_of(self, messages: list[dict]) -> str:
        if not self.tokenizer.chat_template:
            return "\n\n".join(message["content"] for message in messages) + "\n\n"
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    def ask(self, jobs: list[tuple[str, list[dict]]], keep) -> dict[str, str]:
        import torch

        texts = {key: self.text_of(messages) for key, messages in jobs}
        order = sorted(texts, key=lambda key: -len(texts[key]))  # like lengths together; too long shows at once
        for start in range(0, len(order), self.args.batch_size):
            keys = order[start : start + self.args.batch_size]
            batch = self.tokenizer(
                [texts[key] for key in keys], return_tensors="pt", padding=True, add_special_tokens=False
            ).to(self.model.device)
            self.requests += len(keys)
            with torch.inference_mode():
                made = self.model.generate(**batch, max_new_tokens=self.args.max_tokens, do_sample=False)
                made = made[:, batch["input_ids"].shape[1] :]
            ends = {*self.model.generation_config.eos_token_id, self.tokenizer.pad_token_id}
            for key, row in zip(keys, made.tolist()):
                cut = len(row) == self.args.max_tokens and not ends & set(row)
                keep(key, Answer(self.tokenizer.decode(row, skip_special_tokens=True), cut))
        return {}


# ----------------------------------------------------------------------------------------------------
# Captions -> rows


@dataclass
class Item:
    """One text to make: a scene's captions merged, or one caption."""

    name: str
    captions: list[str]
    split: str | None
    messages: list[dict]
    text: str = ""
    reasons: list[tuple[str, str]] = field(default_factory=list)
    tries: list[dict] = field(default_factory=list)
    """Answers that were not taken, with what was wrong with them."""
    failed: bool = False
    """There is no answer at all."""
    spent: bool = False
    """The answer was cut before its first word: to ask for a shorter one would not help."""
    filtered: bool = False
    """The server's filter stopped the answer: it would do so again."""
    part: bool = False
    """One of several given texts of its image: it need not say all that the captions say."""
    question: str | None = None
    """What the file says a given text answers."""


class Translator:
    """Asks an engine through a cache and judges what comes back. Without an engine it judges the texts that items have."""

    def __init__(self, engine, cache: Cache | None, glossary: dict[str, list[str]], args):
        self.engine, self.cache, self.glossary, self.args = engine, cache, glossary, args
        self.cached = 0

    def key(self, messages: list[dict]) -> str:
        """What an answer depends on, but for where it is cut: the model, its settings, the mode, the prompt with its captions."""
        asked = [self.engine.name, self.engine.sampling, self.args.mode, messages]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def lacks(self, key: str) -> bool:
        """Whether there is no answer, or one that was cut where less was allowed."""
        answer = self.cache.answers.get(key)
        return answer is None or (answer.cut and answer.limit < self.args.max_tokens)

    def ask(self, items: list[Item], title: str) -> None:
        """Fill in `text` and `reasons` of items from their `messages`. Equal messages are asked once."""
        from tqdm import tqdm

        keys = [self.key(item.messages) for item in items]
        jobs = {key: item.messages for key, item in zip(keys, items) if self.lacks(key)}
        self.cached += len(set(keys)) - len(jobs)
        failures = {}
        if jobs:
            with tqdm(total=len(jobs), desc=title, unit="text", file=sys.stderr, mininterval=1.0) as bar:

                def keep(key: str, answer: Answer) -> None:
                    self.cache.add(key, dataclasses.replace(answer, limit=self.args.max_tokens))
                    bar.update()

                failures = self.engine.ask(list(jobs.items()), keep)
        for key, item in zip(keys, items):
            item.failed = key not in self.cache.answers
            if item.failed:
                item.text, item.reasons = "", [("no answer", failures[key])]
            else:
                self.judge(item, self.cache.answers[key])

    def judge(self, item: Item, answer: Answer) -> None:
        item.text = clean(answer.text)
        item.spent = answer.cut and not item.text
        item.filtered = answer.filtered
        if answer.filtered:
            item.reasons = [("content filter", "")]
        elif answer.cut or not item.text:
            item.reasons = [("cut off", "回答没有写完，请写得简洁")]
        else:
            item.reasons = check(item.captions, item.text, self.glossary, self.args.min_chars)
            if item.part:
                item.reasons = [wrong for wrong in item.reasons if wrong[0] not in LACKING]

    def again(self, item: Item, request: str) -> None:
        """Put the answer and what is asked of the next one behind the item's messages."""
        item.tries.append({"answer": item.text, "reasons": [reason for reason, _ in item.reasons]})
        said = [{"role": "assistant", "content": item.text}] if item.text else []
        item.messages = [*item.messages[:1], *said, {"role": "user", "content": request}]
        if not said:
            item.messages = [{"role": "user", "content": f"{item.messages[0]['content']}\n\n{request}"}]

    def translate(self, items: list[Item]) -> Counter:
        """All of an item's tries; `reasons` is empty where its text is taken. Returns what sent answers back."""
        if not self.engine:
            for item in items:
                given = item.text
                self.judge(item, Answer(given))
                item.text = item.text or given
            return Counter()
        self.ask(items, "translate")
        bad = [item for item in items if item.reasons and not (item.failed or item.spent or item.filtered)]
        sent_back = Counter(reason for item in bad for reason in dict.fromkeys(reason for reason, _ in item.reasons))
        for item in bad:
            told = "；".join(dict.fromkeys(told for _, told in item.reasons))
            self.again(item, f"上面的回答有问题：{told}。请对照英文重新写，只输出改好的中文描述。")
        self.ask(bad, "ask again")
        return sent_back

    def part_duplicates(self, items: list[Item]) -> tuple[int, int]:
        """Ask again for texts that more than `max_duplicates` images have, in the same or nearly the same words. Returns the
        copies before and after: texts that an earlier image has too."""
        limit = self.args.max_duplicates
        taken = [item for item in items if not item.reasons]
        groups = Groups()
        before = copies(taken, groups)
        images: dict[int, list[str]] = {}  # group of texts -> the images that keep one
        over: list[Item] = []
        rank = Counter()
        for item in taken:
            group = groups.of(item.text)
            holders = images.setdefault(group, [])
            if item.name not in holders and len(holders) >= limit:
                over.append(item)
                item.reasons = [("duplicate", "")]
                rank[group] += 1
                # The number makes requests for equal captions differ, else they would share one answer again.
                request = (
                    f"另外{limit}幅图像已经有同样的描述。请换一种说法，写全英文里的每个细节，不要增加英文里没有的内容。"
                    f"这是第{rank[group]}种写法，只输出中文描述。"
                )
                if self.engine:
                    self.again(item, request)
            elif item.name not in holders:
                holders.append(item.name)
        if self.engine:
            self.ask(over, "duplicates")
        for item in over:
            holders = images.setdefault(groups.of(item.text), []) if item.text else []
            if item.reasons or (item.name not in holders and len(holders) >= limit):
                if self.args.keep_duplicates:
                    item.text = item.tries[-1]["answer"] if item.tries else item.text
                    item.reasons, item.failed = [], False
                elif not item.reasons:
                    item.reasons = [("duplicate", "")]
            elif item.name not in holders:
                holders.append(item.name)
        return before, copies([item for item in items if not item.reasons], groups)


def copies(items: list[Item], groups: Groups) -> int:
    """Texts that an earlier image has too."""
    images: dict[int, set[str]] = {}
    for item in items:
        images.setdefault(groups.of(item.text), set()).add(item.name)
    return sum(len(names) - 1 for names in images.values())


def items_of(scenes, output: Path, prompt: str, glossary, mode: str) -> list[Item]:
    items = []
    for scene in scenes:
        name = name_for(scene.image, scene.name, output)
        for captions in [scene.texts] if mode == "merge" else [[text] for text in scene.texts]:
            terms = terms_in(captions, glossary)
            lines = [f"- {term}: {'、'.join(accepted)}" for term, accepted in sorted(terms.items())]
            # In one pass: a caption may hold the words "{glossary}".
            parts = {"{captions}": "\n".join(captions), "{glossary}": "\n".join(lines) or "（无）"}
            text = re.sub("|".join(map(re.escape, parts)), lambda match, parts=parts: parts[match[0]], prompt)
            items.append(Item(name, captions, scene.split, [{"role": "user", "content": text}]))
    return items


def items_given(scenes, output: Path, own_questions: bool) -> list[Item]:
    """One item for each Chinese text that the file has, beside the English captions of its image; with the file's own
    question to it, where it has one. Raises InputError: none."""
    items = []
    for scene in scenes:
        name = name_for(scene.image, scene.name, output)
        captions = [text for text in scene.texts if not is_chinese(text) and re.search("[A-Za-z]", text)]
        given = [text for text in scene.texts if is_chinese(text)]
        for text in given:
            question = scene.prompts.get(text) if own_questions else None
            items.append(Item(name, captions, scene.split, [], text, part=len(given) > 1, question=question))
    if not items:
        raise InputError("--check: the input has no Chinese text")
    return items


def rows_of(items: list[Item], questions: list[str], count: int, seed: int) -> list[dict]:
    """Chat rows. Questions are drawn by seed, image and captions, so a row keeps its question when others come or go."""
    rows, seen, asked = [], set(), {}
    for item in items:
        if item.reasons or (item.name, item.text) in seen:
            continue
        seen.add((item.name, item.text))
        drawn = random.Random(json.dumps([seed, Path(item.name).name, item.captions or item.text])).sample(
            questions, len(questions)
        )
        used = asked.setdefault(item.name, set())
        drawn.sort(key=lambda question: question in used)  # captions of one image get different questions first
        for question in [item.question] if item.question else drawn[:count]:
            used.add(question)
            split = {} if item.split is None else {"split": item.split}
            rows.append({"img": item.name, "prompt": question, "label": item.text} | split)
    return rows


def write_results(places: dict[str, Path], rows: list[dict], items: list[Item], report: dict) -> None:
    """Write rows, what was put aside, and the report; without rows the output stays as it was. Raises InputError."""
    from report import json_lines, json_list, write_atomic, write_json

    aside = [
        {"img": item.name, "captions": item.captions, "answer": item.text,
         "reasons": list(dict.fromkeys(reason for reason, _ in item.reasons)),
         "details": [told for _, told in item.reasons if told], "earlier": item.tries}
        for item in items if item.reasons
    ]  # fmt: skip
    try:
        if aside:
            write_atomic(places["rejected"], json_lines(aside))
        else:
            places["rejected"].unlink(missing_ok=True)
        write_json(places["report"], report)
        if rows:
            as_text = json_lines if places["output"].suffix == ".jsonl" else json_list
            write_atomic(places["output"], as_text(rows))
    except OSError as error:
        raise InputError(f"{error.filename or places['output']}: cannot be written: {error.strerror}") from None


def summary(report: dict) -> str:
    def counts(found: dict) -> str:
        return ", ".join(f"{name} {count}" for name, count in found.items()) or "none"

    length = report["length"]
    rows = f"{report['rows']} rows of {report['images']} images; {report['texts']} texts"
    asked = [
        f"{rows} asked for, {report['cached']} answers from the cache, {report['requests']} requests",
        f"retries: {counts(report['retries'])}",
        f"answers sent back: {counts(report['sent_back'])}",
    ]
    lines = [
        *(asked if report["model"] else [f"{rows} checked"]),
        f"put aside: {counts(report['rejected'])}",
        f"duplicates: {report['duplicates']['before']} before, {report['duplicates']['after']} after",
        f"characters: {length['min']} to {length['max']}, median {length['median']}",
    ]
    lines += [f"  {row['img']}: {row['label']}" for row in report["samples"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    own_questions = args.questions is None
    if own_questions:
        args.questions = 1 if args.mode == "each" else 3
    checked(args)
    source, output = Path(args.input), Path(args.output)
    if source.is_dir():
        source = source / "captions.json"
    ends = {"cache": ".cache.jsonl", "rejected": ".rejected.jsonl", "report": ".report.json"}
    sources = (source, args.prompt_file, args.questions_file, args.glossary)
    beside = places_beside(output, [output.name + end for end in ends.values()], sources)
    places = {"output": output} | dict(zip(ends, beside))
    prompt, questions = read_prompt(args.prompt_file), read_questions(args.questions_file)

    glossary = read_glossary(args.glossary)
    found = read_scenes(source, image_root=args.image_root, max_rejected=args.max_rejected)
    for bad in found.rejected[:5]:
        print(f"warning: {bad.file}: row {bad.row}: {bad.reason}", file=sys.stderr)
    without = 0
    if args.check:
        items, engine = items_given(found.scenes, output, own_questions), None
    else:
        for scene in found.scenes:
            scene.texts = [text for text in scene.texts if not is_chinese(text)]
        scenes = [scene for scene in found.scenes if scene.texts]
        if without := len(found.scenes) - len(scenes):
            left = (
                f"{without} images have no text without Chinese characters and are left out; --check judges such texts"
            )
            print(f"warning: {left}", file=sys.stderr)
        if not scenes:
            raise InputError(f"{source}: no caption is English; --check judges Chinese ones")
        items = items_of(scenes, output, prompt, glossary, args.mode)
        engine = Local(args) if args.local else Endpoint(args)
    with contextlib.closing(Cache(places["cache"])) if engine else contextlib.nullcontext() as cache:
        if cache:
            engine.answered = bool(cache.answers)
        translator = Translator(engine, cache, glossary, args)
        try:
            sent_back = translator.translate(items)
        except KeyboardInterrupt:
            print("answers so far are kept; run the same command again to go on", file=sys.stderr)
            raise
        if all(item.failed for item in items):
            raise InputError(f"{args.base_url or args.local}: no answer to any request: {items[0].reasons[0][1]}")
        before, after = translator.part_duplicates(items)
        rows = rows_of(items, questions, args.questions, args.seed)
        sizes = [len(item.text) for item in items if not item.reasons] or [0]
        taken = list({row["img"]: row for row in rows}.values())
        report = {
            "input": args.input, "output": args.output, "model": engine and engine.name, "mode": args.mode,
            "rows": len(rows), "images": len(taken), "texts": len(items), "requests": engine.requests if engine else 0,
            "cached": translator.cached, "retries": dict(engine.retries) if engine else {}, "sent_back": dict(sent_back),
            "rejected": dict(Counter(r for item in items for r in dict.fromkeys(reason for reason, _ in item.reasons))),
            "rejected_texts": sum(bool(item.reasons) for item in items), "images_without_english": without,
            "duplicates": {"before": before, "after": after},
            "length": {"min": min(sizes), "median": statistics.median(sizes), "max": max(sizes)},
            "samples": [taken[i * len(taken) // min(5, len(taken))] for i in range(min(5, len(taken)))],
        }  # fmt: skip
        write_results(places, rows, items, report)
    print(summary(report))
    if count := sum(item.spent for item in items):
        print(f"of {count} texts the answer {spent(args.max_tokens)}", file=sys.stderr)
    if not rows:
        left = "is that of an earlier run" if output.exists() else "is not written"
        raise InputError(f"no answer passed the checks; {places['rejected']} says why, {output} {left}")
    print(f"{output}" + (f"; put aside: {places['rejected']}" if report["rejected_texts"] else ""))
    unanswered = sum(item.failed for item in items)
    if unanswered:
        print(f"error: {unanswered} texts have no answer; run the same command again to ask for them", file=sys.stderr)
    return 1 if unanswered else 0


if __name__ == "__main__":
    with user_errors():
        sys.exit(main())
