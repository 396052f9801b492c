"""Values and bytes that parsers stumble over: of the wrong type, too large, too deep, too clever."""

import math

DEEP, WIDE = 150, 20_000


def _nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def _chain(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e-320, 1e308, 1e18,
    math.inf, -math.inf, math.nan, 2**31, 2**63, -(2**63) - 1, 10**40, 10**400,
    "", " ", "a", "A b", "null", "true", "nan", "1e5", "-1", "0x10", "é\u0301", "\u2028", "\0", "\ud800",
    "१२", "~", "/", ".", "..", "../../../etc/passwd", "/etc/passwd", "/dev/zero", "C:\\x", "http://localhost:9/x",
    "x" * WIDE, "float16", "float32", "torch.float32", "int8", "auto", "none", "all-linear", "gelu", "llama",
    "(", "[", "*", "\\", ".*", ".*" * 30 + "!", "(a+)+$", "(.*)*!", "a{0,60000}" * 9, "(?i)x", "(?<=a)b",
    "{% for i in range(99999999) %}x{% endfor %}", "{{ raise_exception('no') }}", "{{ x.y.z }}", "{%",
    "<image>", "<image>" * 50, "<|im_end|>",
    [], {}, [[]], [{}], [None], [1, "a"], ["a", "a"], [0] * WIDE, [""], [1e400, -1],
    {"a": 1}, {"": None}, {"role": "user"}, {"type": "image"}, {".*" * 30 + "!": 3},
    {str(number): number for number in range(2000)}, _nested(DEEP), _chain(DEEP),
]  # fmt: skip
"""Replacements of a value, or further values beside it."""

KEYS = ["", " ", "\0", "\ud800", "..", "../x", "/etc/x", "a.b", "__class__", "_name", "type", "x" * 500,
        ".*" * 30 + "!", "<<", "*", "1", "None", "dtype", "quantization_config", "auto_map"]  # fmt: skip

BYTES = [
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"\n", b"\r", b"\r\n\r\n", b",",
    b'"', b"'", b"{", b"}", b"[", b"]", b":", b"#", b"\t", b"&a ", b"*a", b"<<: *a\n", b"- ", b"? ", b"| ",
    b"!!python/object:os.system ", b"!!binary aa", b"---\n", b"...\n", b"%YAML 9\n", b"2024-01-05", b"0o17",
    b"1_000", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"\\ud800", b"\\u0000", b"[" * 3000,
    b'{"a":' * 3000,
    b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
    b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]\n",
]  # fmt: skip
"""Insertions into a file's bytes."""
