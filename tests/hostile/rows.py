"""Rows of a list: captions and URLs that no one would think of."""

from __future__ import annotations

from tests.hostile.case import Case, case

_CAPTIONS = {
    "space": " ", "newline": "two\nlines", "windows-lines": "two\r\nlines", "tab": "a\tb", "nul": "a\0b",
    "only-nul": "\0", "100000-characters": "long " * 20_000, "100000-emoji": "🦊" * 100_000,
    "rtl": "שלום \u202eolleh\u202c عالم", "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈", "combining": "Z" + "\u0351" * 500,
    "not-composed": "e\u0301 \u00e9", "controls": "".join(map(chr, range(1, 32))), "bom": "\ufefftext",
    "replacement": "\ufffd", "noncharacters": "\ufffe\uffff\U0010ffff", "private-use": "\ue000\uf8ff",
    "line-separators": "a\u2028b\u2029c\x85d", "zero-width": "\u200b\u200c\u200d\u2060", "quotes": "\"a\" 'b' `c` „d“",
    "backslashes": "\\n \\0 \\u0000 \\", "html": "<script>alert(1)</script>&amp;", "sql": "'; DROP TABLE images; --",
    "format": "%s%n {0} {{}} ${HOME} $(id)", "csv": 'a,"b",""c""', "json": '{"url": null}', "null-word": "null",
    "nan-word": "NaN", "number": "1e999", "true": "true", "formula": "=cmd|' /C calc'!A0",
    "path": "../../../etc/passwd",
    "url": "http://<canary>/", "ansi": "\x1b[2J\x1b[31m",
}  # fmt: skip

CASES: list[Case] = [
    case("caption-empty", "ok", "http://<server>/ok/<number>.png?caption-empty", caption=""),
    case("caption-null", "ok", "http://<server>/ok/<number>.png?caption-null", caption=None),
    *[
        case(f"caption-{name}", "ok", f"http://<server>/ok/<number>.png?caption-{name}", caption=text)
        for name, text in _CAPTIONS.items()
    ],
    case("row-url-empty", "bad_url", ""),
    case("row-url-space", "bad_url", "   "),
    case("row-url-nul", "bad_url", "\0"),
    case("row-url-newline", "bad_url", "\n"),
    case("row-url-null", "bad_url|bad_record", "<null>"),
    case("row-same-url-1", "ok", "http://<server>/ok/5.png", number=5),
    case("row-same-url-2", "ok", "http://<server>/ok/5.png", number=5),
]
