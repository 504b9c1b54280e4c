"""The service files start the page with flags that it has, alike, and their limits agree."""

import configparser
import re
import shlex
from pathlib import Path

import web_demo

DEPLOY = Path(__file__).parents[1] / "deploy"


def text(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def test_both_start_the_page_alike_and_nginx_lets_its_uploads_through():
    program = configparser.RawConfigParser(inline_comment_prefixes=(" ;",))
    program.read_string(text("supervisor.conf"))
    program = program["program:rs-web"]
    unit = dict(re.findall(r"^(\w+)=(.*)$", text("rs-web.service"), re.M))
    assert program["command"] == unit["ExecStart"]
    assert (program["directory"], program["user"]) == (unit["WorkingDirectory"], unit["User"])
    assert (program["stopsignal"], program["stopwaitsecs"]) == (unit["KillSignal"][3:], unit["TimeoutStopSec"])
    args = web_demo.build_parser().parse_args(shlex.split(program["command"])[2:])
    assert args.host == "127.0.0.1" and not args.share
    assert "-" + str(Path(unit["WorkingDirectory"]) / args.store) in unit["ReadWritePaths"].split()
    proxy = text("nginx.conf")
    assert f"proxy_pass http://{args.host}:{args.port};" in proxy
    assert f"client_max_body_size {args.max_upload_mb + 1}m;" in proxy
    assert "proxy_buffering off;" in proxy


def test_the_two_readmes_give_the_same_commands_and_say_what_the_page_says():
    blocks = [re.findall(r"```.*?```", text(name), re.S) for name in ("README.md", "README_zh.md")]
    assert blocks[0] == blocks[1] and len(blocks[0]) == 7
