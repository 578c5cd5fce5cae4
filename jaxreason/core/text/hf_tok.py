"""Tokenizers of Hugging Face models: a `tokenizer.json`, read with the `tokenizers` package."""

import dataclasses
import json
from collections.abc import Sequence

import tokenizers
from etils import epath

from jaxreason.core.errors import UserError, nearest
from jaxreason.core.text.tokenizer import as_ids, sha256_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfJson:
    """The `tokenizer.json` of a Hugging Face model."""

    path: str = ""
    """Path of `tokenizer.json` or of the folder that holds it, local or in a bucket."""
    eos: str | None = None
    """Token that ends a document; None: what the files beside `tokenizer.json` name."""
    bos: str | None = None
    """Token that opens a document; None: what the files beside it name, if any."""
    parse_special: bool = False
    """Whether special tokens written out in a text (`<|im_end|>`) become their ids. False reads
    them as plain text, so that a document cannot end itself; chat templates need True."""


class HfTokenizer:
    """A `tokenizer.json` as a tokenizer.

    Truncation and padding that the file asks for are switched off, and nothing is added around the
    text. `vocab_size` counts to the largest id, added tokens included; a model's embedding may have
    more rows.

    Args:
        tokenizer_json: Content of the file.
        eos: Token that ends a document.
        bos: Token that opens one, or None.
        parse_special: See `HfJson.parse_special`.
        name: What errors call the file.

    Raises:
        UserError: the content is no tokenizer, or lacks `eos` or `bos`.
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        eos: str,
        bos: str | None = None,
        parse_special: bool = False,
        name: str = "tokenizer.json",
    ):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the package raises plain Exception, whatever is wrong
            raise UserError(
                f"{name} is not a Hugging Face tokenizer ({' '.join(str(error).split())[:160]}); "
                "expected the tokenizer.json of a model; get it anew"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not parse_special
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        for token in (eos, bos):
            if token is not None and token not in vocabulary:
                raise UserError(
                    f"{name} has no token {token[:60]!r}, expected one of its vocabulary"
                    f"{nearest(token[:60], self._special())}; set eos or bos to a token it has"
                )
        self._json, self._eos, self._bos, self._parse_special = (
            tokenizer_json,
            eos,
            bos,
            parse_special,
        )
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.eos_id: int = vocabulary[eos]
        self.bos_id: int | None = None if bos is None else vocabulary[bos]
        self.fingerprint: str = sha256_of(
            "hf", tokenizer_json, self.eos_id, self.bos_id, parse_special
        )

    def _special(self) -> list[str]:
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without begin or end of document."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text, computed on all cores."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`. Begin, end and ids outside the vocabulary give no text."""
        drop = (self.eos_id, self.bos_id)
        kept = [i for i in as_ids(ids) if 0 <= i < self.vocab_size and i not in drop]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    @property
    def settings(self) -> HfJson:
        """The config that names its tokens, without a path."""
        return HfJson(eos=self._eos, bos=self._bos, parse_special=self._parse_special)

    def same_ids(self, other: "HfTokenizer") -> bool:
        """Whether plain text has the same ids; the tokens that end and open it may differ."""
        return self._json == other._json

    def reading_special(self, parse_special: bool) -> "HfTokenizer":
        """Returns the same tokenizer that reads special tokens in a text as ids, or as text."""
        return HfTokenizer(
            self._json, eos=self._eos, bos=self._bos, parse_special=parse_special, name="tokenizer"
        )

    def save(self, folder: epath.PathLike) -> HfJson:
        """Writes `tokenizer.json` into `folder`; returns the config that loads it there."""
        path = epath.Path(folder) / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.parent / ".tokenizer.json.tmp"
        part.write_text(self._json)
        part.replace(path)
        return dataclasses.replace(self.settings, path=str(path))


def load_hf_json(cfg: HfJson) -> HfTokenizer:
    """Returns the tokenizer that `cfg` names.

    The end of document is, in this order, `cfg.eos`, then what `tokenizer_config.json`,
    `special_tokens_map.json`, `generation_config.json` or `config.json` in the same folder name; of
    a list of ids, the first. The beginning likewise, or none.

    Raises:
        UserError: a file is absent or damaged, or no end of document is named.
    """
    if not cfg.path:
        raise UserError("HfJson.path is empty, expected the path of a tokenizer.json; set it")
    path = epath.Path(cfg.path)
    path = path / "tokenizer.json" if path.is_dir() else path
    content = _read(path)
    if content is None:
        raise UserError(
            f"no file {str(path)!r}, expected a tokenizer.json or the folder that holds one; "
            "give its path"
        )
    eos, bos = (
        given if given is not None else _named(path.parent, key, content)
        for key, given in (("eos", cfg.eos), ("bos", cfg.bos))
    )
    if eos is None:
        raise UserError(
            f"neither tokenizer_config.json, special_tokens_map.json nor generation_config.json "
            f"beside {str(path)!r} names an end-of-text token; set eos to one of its tokens"
        )
    return HfTokenizer(
        content, eos=eos, bos=bos, parse_special=cfg.parse_special, name=repr(str(path))
    )


def _read(path: epath.Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"cannot read {str(path)!r} ({error.strerror or error}); check the file"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{str(path)!r} is not UTF-8 text; get the file anew") from None


def _named(folder: epath.Path, key: str, tokenizer_json: str) -> str | None:
    """Returns the token that the files in `folder` name for `key` ("eos" or "bos"), if any."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _fields(folder / name).get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    for name in ("generation_config.json", "config.json"):
        ids = _fields(folder / name).get(f"{key}_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(first, int):
            return _token_of(tokenizer_json, first)
    return None


def _token_of(tokenizer_json: str, token_id: int) -> str | None:
    try:
        return tokenizers.Tokenizer.from_str(tokenizer_json).id_to_token(token_id)
    except Exception:  # a damaged file is told of by HfTokenizer
        return ""


def _fields(path: epath.Path) -> dict:
    content = _read(path)
    if content is None:
        return {}
    try:
        fields = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{str(path)!r} is not JSON (line {error.lineno}: {error.msg}); get the file anew"
        ) from None
    return fields if isinstance(fields, dict) else {}
