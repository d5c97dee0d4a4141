"""CLIP's byte-pair encoding as a tokenizer.json, with as much of training's cleaning as it can say.

Training cleans captions with ftfy and html.unescape. Here quotes are straightened, the HTML
entities of European text, ligatures and full-width letters resolved, control characters removed,
text brought to NFC and lower case and white space joined. NOT_CLEANED says what stays different.
"""

import gzip
import html
from html.entities import name2codepoint

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from aclip.method.tokens import END_ID, START_ID

# As open_clip's tokeniser calls them, so that a caption that spells one out gets the same id.
START, END = "<start_of_text>", "<end_of_text>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
AMPERSANDS = ("amp", "AMP", "#38", "#038", "#x26")
ENTITIES = (
    *(
        name
        for name, code in name2codepoint.items()
        if name != "amp" and (code < 0x180 or 0x2000 <= code < 0x2200)
    ),
    *("LT", "GT", "QUOT", "apos", "#34", "#034", "#39", "#039", "#160", "#x27", "#8217"),
)
"""The named ones of Latin letters and of signs, and numbers that are common."""
# What ftfy replaces: pattern, replacement.
CLEANING = (
    ("[\u02bc\u2018-\u201b]", "'"),
    ("[\u201c-\u201f]", '"'),
    ("\ufb00", "ff"),
    ("\ufb01", "fi"),
    ("\ufb02", "fl"),
    ("\ufb03", "ffi"),
    ("\ufb04", "ffl"),
    (r"[\x00-\x08\x0b\x0e-\x1f\x7f\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffc}]", ""),
)
FULL_WIDTH = {
    chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper()
}
"""Full-width signs of ASCII, after capitals have become small, and what ftfy makes of them."""
NOT_CLEANED = (
    "A tokenizer.json can't clean every caption as training does. It resolves quotes, ligatures, "
    "full-width letters, white space, capitals and the HTML entities of European text, but not "
    "text that was decoded wrongly (`Ã©` for `é`), other numeric entities than those of quotes "
    "(`&#233;`), entities of rare signs or without their semicolon (`&alpha;`, `&copy 2020`), "
    "half-width katakana, and control characters of Windows. For captions straight from the web, "
    'call `open_clip.tokenizer.get_clean_fn("lower")` on each first; then all tokens are those of '
    "training, but for a curly quote that is an entity beside a `<`: it is straightened, where "
    "training leaves it."
)
"""What the tokeniser does otherwise than training, for the card."""


def build_tokenizer(context_length: int) -> PreTrainedTokenizerFast:
    """The tokeniser; with truncation=True a longer caption is cut and its end token stays."""
    vocabulary, merges = _byte_pairs()
    bpe = BPE(vocabulary, merges, unk_token=END, end_of_word_suffix="</w>")
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(_cleaning())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, START_ID), (END, END_ID)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=context_length,
    )


def _cleaning() -> list[normalizers.Normalizer]:
    ampersands = [normalizers.Replace(f"&{name};", "&") for name in AMPERSANDS]
    resolve = [normalizers.Replace(f"&{e};", html.unescape(f"&{e};")) for e in ENTITIES]
    replace = [normalizers.Replace(Regex(pattern), text) for pattern, text in CLEANING]
    return [
        # Training resolves again what has become an entity: "&amp;amp;lt;" is "<".
        *ampersands,
        *ampersands,
        *resolve,
        *replace,
        normalizers.NFC(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
        # Python's small sigma depends on its place, that of tokenizers does not.
        normalizers.Replace(Regex(r"(?<=\p{L})Σ(?!\p{L})"), "ς"),
        normalizers.Lowercase(),
        *(normalizers.Replace(wide, narrow) for wide, narrow in FULL_WIDTH.items()),
    ]


def _byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges out of the table that open_clip ships."""
    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    # The first line names the version; after the bytes, alone and at a word's end, every token but
    # the special ones is a merge.
    num_merges = START_ID - 2 * 256
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 1 + num_merges]
    return SimpleTokenizer().encoder, [tuple(line.split()) for line in lines]
