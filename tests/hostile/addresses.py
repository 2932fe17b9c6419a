"""URLs as they stand in a list: schemes, addresses in all spellings, ports, names, and tricks with all of them."""

# ruff: noqa: RUF001

from __future__ import annotations

from tests.hostile.case import case, png, served

_NO = "address_refused"
_ODD = "address_refused|bad_url|dns"
"""Spellings which a parser may take for an address, for a name or for nonsense; none may lead anywhere."""

# Hosts that are the canary: the C library, a browser or a proxy takes each of them for the loopback.
_LOOPBACK = {
    "ipv4": "127.0.0.1", "name": "localhost", "name-upper": "LOCALHOST", "name-dot": "localhost.", "short": "127.1",
    "shorter": "127.0.1", "hex-short": "0x7f.1", "hex": "0x7f000001", "hex-parts": "0x7F.0x0.0x0.0x1",
    "decimal": "2130706433", "octal": "0177.0.0.1", "octal-whole": "017700000001", "mixed": "0x7f.0.0.01",
    "other": "127.127.127.127", "last": "127.255.255.254", "any": "0.0.0.0", "any-short": "0", "any-hex": "0x0",
    "ipv6": "[::1]", "ipv6-long": "[0:0:0:0:0:0:0:1]", "ipv6-zeros": "[0000::0001]", "any6": "[::]",
    "mapped": "[::ffff:127.0.0.1]", "mapped-hex": "[::ffff:7f00:1]", "nat64": "[64:ff9b::7f00:1]",
    "nat64-dotted": "[64:ff9b::127.0.0.1]", "6to4": "[2002:7f00:1::]",
}  # fmt: skip

_LOOPBACK_ODD = {
    "zeros": "127.000.000.001", "dot": "127.0.0.1.", "ipv4-dots": "127..0.0.1", "overflow": "127.0.0.257",
    "overflow-wraps": "383.0.0.1", "more-than-32-bits": "6425673729", "five-parts": "127.0.0.1.1",
    "fullwidth": "１２７.０.０.１", "fullwidth-dots": "127．0．0．1", "ideographic-dots": "127。0。0。1",
    "circled": "①②⑦.⓪.⓪.①", "arabic-digits": "١٢٧.٠.٠.١", "escaped": "%31%32%37.0.0.1",
    "escaped-dots": "127%2e0%2e0%2e1",
    "escaped-name": "%6cocalhost", "fullwidth-name": "ｌｏｃａｌｈｏｓｔ", "soft-hyphen": "local\u00adhost",
    "zero-width": "127.0.0.1\u200b", "subdomain": "a.localhost", "subdomain-dot": "a.localhost.",
    "localdomain": "localhost.localdomain", "ip6-name": "ip6-localhost", "zone": "[fe80::1%25lo]",
    "zone-raw": "[::1%lo]",
    "compatible": "[::127.0.0.1]", "teredo": "[2001:0:7f00:1::80ff:fffe]", "no-brackets": "::1",
    "brackets": "[127.0.0.1]", "future": "[v1.127.0.0.1]", "space": "127.0.0.1 ", "tab": "127.0.0\t.1",
    "line-end": "127.0.0.1\n", "nul": "127.0.0.1\0.example.com", "negative": "-127.0.0.1", "hex-empty": "0x.0x.0",
}  # fmt: skip

# Networks that are nobody's business: (a name, an address in it)
_PRIVATE = {
    "this-network": "0.1.2.3", "ten": "10.255.255.255", "shared": "100.127.255.254", "link-local": "169.254.0.1",
    "metadata": "169.254.169.254", "metadata-decimal": "2852039166", "metadata-mapped": "[::ffff:169.254.169.254]",
    "metadata-v6": "[fd00:ec2::254]", "metadata-alibaba": "100.100.100.200", "private-172": "172.31.255.255",
    "private-192": "192.168.0.1", "private-192-hex": "0xC0A80001", "ietf": "192.0.0.1", "documentation": "203.0.113.1",
    "benchmark": "198.19.255.255", "multicast": "239.255.255.250", "reserved": "250.1.1.1",
    "broadcast": "255.255.255.255", "unique-local": "[fd12::1]", "link-local-v6": "[fe80::1]",
    "multicast-v6": "[ff02::1]", "documentation-v6": "[2001:db8::1]", "site-local": "[fec0::1]",
    "nat64-ten": "[64:ff9b::a00:1]", "6to4-private": "[2002:c0a8:1::1]", "nat64-local": "[64:ff9b:1::a00:1]",
}  # fmt: skip

_SCHEMES = {
    "ftp": "ftp://<canary>/a.png", "file": "file:///etc/hostname", "file-one-slash": "file:/etc/hostname",
    "file-host": "file://localhost/etc/hostname", "file-upper": "FiLe:///etc/hostname",
    "local": "local:///etc/hostname", "data": "data:image/gif;base64,R0lGODlhAQABAAAAACw=",
    "javascript": "javascript:alert(1)", "gopher": "gopher://<canary>/_x", "dict": "dict://<canary>/d:a",
    "ldap": "ldap://<canary>/", "smb": "smb://<canary>/a/b.png", "tftp": "tftp://<canary>/a",
    "telnet": "telnet://<canary>",
    "imap": "imap://<canary>/", "rtsp": "rtsp://<canary>/a", "sftp": "sftp://<canary>/a", "ws": "wss://<canary>/",
    "s3": "s3://bucket/a.png", "gs": "gs://bucket/a.png", "hdfs": "hdfs://<canary>/a.png", "memory": "memory://a.png",
    "chained": "simplecache::file:///etc/hostname", "unix-socket": "http+unix://%2Fvar%2Frun%2Fdocker.sock/",
    "httpx": "httpx://<canary>/", "feed": "feed:http://<canary>/", "mailto": "mailto:a@example.com",
    "magnet": "magnet:?xt=urn:btih:0", "cid": "cid:image001@example.com", "blob": "blob:http://<canary>/0",
}  # fmt: skip

_NO_URLS = {
    "words": "not a url", "path": "/etc/passwd", "windows-path": "C:\\Users\\a.png", "file-name": "image.png",
    "no-scheme": "www.example.com/a.png", "slashes": "//<canary>/a.png", "backslashes": "\\\\<canary>\\a.png",
    "scheme-only": "http:", "scheme-and-slashes": "http://", "https-only": "https://", "word-http": "http",
    "no-scheme-name": "://<canary>/", "space-in-scheme": "ht tp://<canary>/", "no-host-but-port": "http://:80/",
    "no-host-but-path": "http:///a.png", "query-only": "http://?a", "fragment-only": "http://#a",
    "zone-nonsense": "http://[fe80::1%2z5lo]:99@/a.png", "zone-sharp-s": "http://[fe80::1%2\u00df5lo]:99/a.png",
    "half-an-ipv6": "http://[::1/a.png", "other-half": "http://::1]/a.png", "empty-ipv6": "http://[]/",
    "bad-ipv6": "http://[12345::]/", "port-65536": "http://127.0.0.1:65536/", "port-negative": "http://127.0.0.1:-1/",
    "port-word": "http://127.0.0.1:port/", "port-huge": "http://127.0.0.1:" + "9" * 5_000 + "/",
    "html": "<img src=http://<canary>/>", "two-urls": "http://<canary>/a.png http://<canary>/b.png",
    "json": '{"url": "http://<canary>/"}', "quoted": '"http://<canary>/a.png"', "single-slash": "http:/<canary>/a.png",
    "no-slash": "http:<canary>/a.png", "three-slashes": "http:///<canary>/a.png", "five-slashes": "http://///<canary>/",
    "http-backslashes": "http:\\\\<canary>\\a.png", "semicolon": "http;//<canary>/",
    "double-scheme": "http://http://<canary>/",
    "nan": "nan", "none": "None", "dash": "-", "question": "?", "sql": "' OR 1=1; --", "option": "--output /tmp/x",
    "at-file": "@/etc/passwd", "glob-range": "http://<canary>/[1-9].png", "pipe": "|id",
}  # fmt: skip


def _no_url(url: str) -> str:
    if "<canary>" in url:  # a browser would mend some of these, and then the address counts
        return "bad_url|scheme_refused|address_refused|dns"
    if "fe80" in url:
        return "bad_url|credentials_in_url|address_refused"
    return "bad_url" if ":" not in url or url.startswith("http:") else "bad_url|scheme_refused"


_NAMES = {
    "unknown": "nobody.invalid", "idn": "пример.invalid", "idn-dot": "пример。invalid", "snowman": "☃.invalid",
    "emoji": "🦊.invalid", "punycode-broken": "xn--a-.invalid", "punycode-bad": "xn--ls8h\u0301.invalid",
    "sharp-s": "straße.invalid", "label-64": "a" * 64 + ".invalid", "label-63": "a" * 63 + ".invalid",
    "300-long": "a." * 150 + "invalid", "100-kb": "a" * 100_000 + ".invalid", "underscore": "a_b.invalid",
    "hyphen-first": "-a.invalid", "empty-label": "a..invalid", "dot-first": ".invalid", "star": "*.invalid",
    "space": "a b.invalid", "escaped-space": "a%20b.invalid", "rtl": "\u202einvalid.moc", "control": "a\x01.invalid",
    "braces": "{a}.invalid", "only-dots": "..",  "nul-escaped": "a%00.invalid", "slash-escaped": "a%2f.invalid",
    "nul": "a\0.invalid", "nul-and-sharp-s": "stra\u00dfe.inva\0lid",
}  # fmt: skip

_SPOOFED = {  # a host that looks allowed before the one that is asked for
    "user": ("http://user@<server>/ok/1.png", "credentials_in_url"),
    "password": ("http://user:secret@<server>/ok/1.png", "credentials_in_url"),
    "password-only": ("http://:secret@<server>/ok/1.png", "credentials_in_url"),
    "escaped-password": ("http://user%3Asecret@<server>/ok/1.png", "credentials_in_url"),
    "password-with-slash": ("http://user:sec/ret@<server>/ok/1.png", "credentials_in_url|bad_url|dns"),
    "password-like-a-port": ("http://user:secret/x@<server>/ok/1.png", "credentials_in_url|bad_url|dns"),
    "password-and-bad-ipv6": ("http://user:secret@[::1/ok/1.png", "credentials_in_url|bad_url"),
    "password-and-bad-port": ("http://user:secret@<server>x/ok/1.png", "credentials_in_url|bad_url"),
    "password-unquoted": ("http://us er:secret^@<server>/ok/1.png", "credentials_in_url|bad_url"),
    "password-with-at": ("http://user:sec@ret@<server>/ok/1.png", "credentials_in_url|bad_url"),
    "nobody": ("http://@<canary>/", "credentials_in_url|bad_url|address_refused"),
    "nobody-colon": ("http://:@<canary>/", "credentials_in_url|bad_url|address_refused"),
    "good-as-user": ("http://127.0.0.1@<canary>/", "credentials_in_url"),
    "good-as-user-and-port": ("http://<server>@<canary>/", "credentials_in_url"),
    "good-then-fragment-at": ("http://<server>#@<canary>/", "http_4xx|bad_url|credentials_in_url"),
    "good-then-query-at": ("http://<server>?@<canary>/", "http_4xx|bad_url|credentials_in_url"),
    "good-then-slash-at": ("http://<server>/@<canary>/", "http_4xx"),
    "good-then-backslash-at": ("http://<server>\\@<canary>/", "http_4xx|bad_url|credentials_in_url|address_refused"),
    "good-then-tab-at": ("http://<server>\t@<canary>/", "credentials_in_url|bad_url"),
    "good-then-line-at": ("http://<server>\r\n@<canary>/", "credentials_in_url|bad_url"),
    "good-then-nul-at": ("http://<server>\0@<canary>/", "credentials_in_url|bad_url"),
    "good-then-semicolon": ("http://<server>;<canary>/", "bad_url|address_refused|dns"),
    "good-then-comma": ("http://<server>,<canary>/", "bad_url|address_refused|dns"),
    "good-then-space": ("http://<server> <canary>/", "bad_url|address_refused|dns"),
    "two-ats": ("http://a@<server>@<canary>/", "credentials_in_url|bad_url"),
    "fragment-of-canary": ("http://<canary>#@<server>/ok/1.png", "address_refused|bad_url|credentials_in_url"),
    "backslash-of-canary": ("http://<canary>\\@<server>/ok/1.png", "address_refused|bad_url|credentials_in_url"),
    "fullwidth-at": ("http://<server>＠<canary>/", "bad_url|address_refused|dns|credentials_in_url"),
    "fullwidth-slash": ("http://<canary>／<server>/", "bad_url|address_refused|dns"),
    "fullwidth-colon": ("http://127.0.0.1：<cport>/", "bad_url|address_refused|dns"),
    "host-is-also-name": ("http://<server>.invalid/ok/1.png", "bad_url"),
    "allowed-with-other-port": ("http://127.0.0.1:1/ok/1.png", "address_refused"),
    "allowed-without-port": ("http://127.0.0.1/ok/1.png", "address_refused"),
    "allowed-empty-port": ("http://127.0.0.1:/ok/1.png", "address_refused|bad_url"),
    "allowed-port-0": ("http://127.0.0.1:0/ok/1.png", "address_refused|bad_url"),
    "allowed-fullwidth-port": ("http://127.0.0.1:８０/ok/1.png", "address_refused|bad_url"),
    "allowed-port-plus": ("http://127.0.0.1:+<sport>/ok/1.png", "address_refused|bad_url"),
    "allowed-port-space": ("http://127.0.0.1: <sport>/ok/1.png", "address_refused|bad_url"),
    "allowed-port-underscore": ("http://127.0.0.1:8_0/ok/1.png", "address_refused|bad_url"),
    "allowed-host-ssh-port": ("http://127.0.0.1:22/", "address_refused"),
    "allowed-by-another-name": ("http://localhost:<sport>/ok/<number>.png", "address_refused"),
    "allowed-on-ipv6": ("http://[::1]:<sport>/ok/1.png", "address_refused"),
    "allowed-mapped": ("http://[::ffff:127.0.0.1]:<sport>/ok/<number>.png", "address_refused|ok"),
    "allowed-decimal": ("http://2130706433:<sport>/ok/<number>.png", "address_refused|ok"),
    "allowed-port-zeros": ("http://127.0.0.1:000<sport>/ok/<number>.png", "ok|bad_url"),
}  # fmt: skip

_C = "http://<server>/c/"
_KB100 = "x" * 100_000

# What a good URL may look like: name -> (URL, reasons)
_FETCHED = {
    "upper-case-scheme": ("HTTP://<server>/ok/<number>.png", "ok"),
    "spaces-around": ("  http://<server>/ok/<number>.png  ", "ok"),
    "line-end": ("http://<server>/ok/<number>.png\n", "ok"),
    "windows-line-end": ("http://<server>/ok/<number>.png\r\n", "ok"),
    "tab-first": ("\thttp://<server>/ok/<number>.png", "ok"),
    "no-break-space": ("\u00a0http://<server>/ok/<number>.png", "ok|bad_url|scheme_refused"),
    "byte-order-mark": ("\ufeffhttp://<server>/ok/<number>.png", "ok|bad_url|scheme_refused"),
    "line-end-inside": ("http://<server>/ok/\n<number>.png", "ok|bad_url|http_4xx"),
    "tab-in-host": ("http://127.0.\t0.1:<sport>/ok/<number>.png", "ok|bad_url|dns|address_refused"),
    "fragment": ("http://<server>/ok/<number>.png#part?x=1", "ok"),
    "empty-fragment": ("http://<server>/ok/<number>.png#", "ok"),
    "empty-query": ("http://<server>/ok/<number>.png?", "ok"),
    "odd-query": ("http://<server>/ok/<number>.png?a=%&&=;b=[1]{2}|^`\"<>", "ok"),
    "url-in-query": ("http://<server>/ok/<number>.png?u=http://<canary>/", "ok"),
    "url-in-path": ("http://<server>/ok/http://<canary>/<number>.png", "ok"),
    "cyrillic": ("http://<server>/ok/снег/<number>.png", "ok"),
    "emoji": ("http://<server>/ok/🦊👩‍👩‍👧/<number>.png", "ok"),
    "rtl": ("http://<server>/ok/\u202eשלום/<number>.png", "ok"),
    "not-composed": ("http://<server>/ok/e\u0301/<number>.png", "ok"),
    "space": ("http://<server>/ok/a b/<number>.png", "ok"),
    "escaped-space": ("http://<server>/ok/a%20b/<number>.png", "ok"),
    "escaped-slash": ("http://<server>/ok/a%2Fb/<number>.png", "ok"),
    "escaped-latin-1": ("http://<server>/ok/caf%E9/<number>.png", "ok"),
    "escaped-nul": ("http://<server>/ok/a%00/<number>.png", "ok|bad_url"),
    "nul": ("http://<server>/ok/a\0/<number>.png", "ok|bad_url|http_4xx"),
    "bare-percent": ("http://<server>/ok/100%/<number>.png", "ok"),
    "bad-escape": ("http://<server>/ok/%zz%1/<number>.png", "ok"),
    "brackets": ("http://<server>/ok/[1]{2}/<number>.png", "ok"),
    "pipes": ("http://<server>/ok/a|b^c`d\"e<f>/<number>.png", "ok"),
    "backslash-in-path": ("http://<server>/ok/a\\b/<number>.png", "ok|bad_url"),
    "semicolons": ("http://<server>/ok/a;b=c/<number>.png?v=1;w=2", "ok"),
    "double-slashes": ("http://<server>/ok//a///<number>.png", "ok"),
    "dots": ("http://<server>/ok/a/../b/./<number>.png", "ok"),
    "dots-above-the-root": ("http://<server>/../../ok/<number>.png", "ok"),
    "escaped-dots": ("http://<server>/ok/%2e%2e/ok/<number>.png", "ok"),
    "injection-escaped": ("http://<server>/ok/a%0d%0aX-Evil:%201%0d%0a%0d%0a/<number>.png", "ok|bad_url"),
    "injection-raw": ("http://<server>/ok/a\r\nX-Evil: 1\r\n/<number>.png", "ok|bad_url|http_4xx"),
    "injection-request": ("http://<server>/ok/<number>.png HTTP/1.1\r\nHost: x\r\n\r\nGET /evil HTTP/1.1\r\n",
                          "ok|bad_url|http_4xx|reset|bad_response"),
    "injection-query": ("http://<server>/ok/<number>.png?a=\r\nX-Evil: 1", "ok|bad_url"),
    "injection-unicode": ("http://<server>/ok/a\u560d\u560aX-Evil: 1/<number>.png", "ok"),
    "injection-fragment": ("http://<server>/ok/<number>.png#\r\nX-Evil: 1", "ok|bad_url"),
    "8-kb": ("http://<server>/ok/" + "x" * 7_900 + "/<number>.png", "ok"),
    "100-kb": ("http://<server>/ok/" + _KB100 + "/<number>.png", "ok|bad_url"),
    "100-kb-query": ("http://<server>/ok/<number>.png?" + _KB100, "ok|bad_url"),
    "2-mb": ("http://<server>/ok/" + "x" * 2_000_000 + "/<number>.png", "ok|bad_url|http_4xx"),
    "9-mb": ("http://<server>/ok/" + "x" * 9_000_000 + "/<number>.png", "bad_url"),
    "10000-segments": ("http://<server>/ok" + "/a" * 10_000 + "/<number>.png", "ok|bad_url"),
}  # fmt: skip

CASES = [
    *[case(f"loopback-{name}", _NO, f"http://{host}:<cport>/ok/1.png") for name, host in _LOOPBACK.items()],
    *[case(f"loopback-{name}", _ODD, f"http://{host}:<cport>/ok/1.png") for name, host in _LOOPBACK_ODD.items()],
    case("loopback-https", _NO, "https://<canary>/ok/1.png"),
    case("loopback-https-name", _NO, "https://localhost:<cport>/ok/1.png"),
    *[case(f"private-{name}", _NO, f"http://{host}/latest/meta-data/") for name, host in _PRIVATE.items()],
    case("private-metadata-name", "dns|address_refused", "http://metadata.google.internal/computeMetadata/v1/"),
    *[case(f"scheme-{name}", "scheme_refused", url) for name, url in _SCHEMES.items()],
    *[case(f"no-url-{name}", _no_url(url), url) for name, url in _NO_URLS.items()],
    *[case(f"name-{name}", "dns" if name == "unknown" else "dns|bad_url", f"http://{host}/a.png")
      for name, host in _NAMES.items()],
    *[case(f"spoofed-{name}", expected, url) for name, (url, expected) in _SPOOFED.items()],
    *[case(f"url-{name}", expected, url) for name, (url, expected) in _FETCHED.items()],
    served("url-below-a-file", "ok", url=_C + "url-below-a-file/a/b/c.jpg", content=png),
    case("url-closed-port", "connect", "http://<closed>/a.png"),
]  # fmt: skip
