"""Configuration of the model as a transformers class, which also reads those of released models and of families."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import AutoConfig, PretrainedConfig

from dph._folder import AUTO_MAP, IMPLEMENTATION_KEYS, MODULE, find_file, read_json, read_text, refuse_code
from dph.chat import END
from dph.checkpoint import RELEASED, config_from_official
from dph.errors import UserError, shown
from dph.model.families import Family
from dph.model.families.fields import own_fields
from dph.model.families.llama import LLAMA
from dph.model.families.mistral import MISTRAL
from dph.model.families.qwen2 import QWEN2
from dph.model.families.qwen3 import QWEN3
from dph.model.rotary_scaling import scaling_of
from dph_kernels.layout import Rotary

POOLERS = ("identity", "bert", "t5", "swiglu_bert", "swiglu_t5")
OPT_ROWS, OPT_END = 50_272, 50_266
"""Rows of OPT's embedding, and the unused row that the paper assigns to ``<|im_end|>``."""

# Range of each size, far above any known model: a larger number is a mistake, and would keep a machine busy for hours.
SIZES = {
    "vocab_size": (1, 2**24),
    "embedding_size": (1, 2**17),
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**20),
    "num_hidden_layers": (0, 1024),
    "num_attention_heads": (1, 2**16),
    "num_key_value_heads": (1, 2**16),
    "head_dim": (2, 2**16),
}
MAX_HEADS = 256
MAX_HEAD_NAME = 100  # characters
MAX_MEMBERS = 64  # of a head
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "im_end_token_id")
DTYPES = ("float64", "float32", "float16", "bfloat16")
FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
NORMS = ("layer", "rms")
SWITCHES = (
    "rope_reversed",
    "qkv_bias",
    "out_bias",
    "ffn_bias",
    "qk_norm",
    "embedding_projection",
)

# Settings of transformers that load other files, or turn the model into another one.
FOREIGN_KEYS = (
    "transformers_weights", "configuration_files", "quantization_config", "fusion_config", "per_layer_config",
    "distributed_config",
)  # fmt: skip

# Of saved folders: the classes that transformers' Auto classes open.
SOURCE = '''"""The classes of dph that open this folder, for programs that read it with trust_remote_code=True."""

from dph.model.auto_classes import BaseModel, Model, ModelConfig, RewardModel

__all__ = ["BaseModel", "Model", "ModelConfig", "RewardModel"]
'''

# Arguments for downloads from the hub, passed on for each file.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class HeadFields:
    """The part of a configuration that describes reward heads, and its checks.

    Attributes:
        reward_heads, task_heads, task_head_forms, reward_pooler, reward_layer, reward_standardised, reward_members,
            reward_dropout, hidden_size, intermediate_size, num_hidden_layers: as those of :class:`ModelConfig`.
    """

    def _set_rewards(
        self,
        *,
        reward_heads: Iterable[str],
        task_heads: Iterable[str],
        task_head_forms: dict[str, dict[str, Any]] | None,
        reward_pooler: str,
        reward_layer: int | list[int],
        reward_standardised: bool,
        reward_members: int,
        reward_dropout: float,
    ) -> None:
        """Set the fields, which ``_check_rewards`` checks."""
        self.reward_heads = list_of_names("reward_heads", reward_heads)
        self.task_heads = list_of_names("task_heads", task_heads)
        self.task_head_forms = {} if task_head_forms is None else task_head_forms
        self.reward_pooler, self.reward_layer, self.reward_standardised = (
            reward_pooler, reward_layer, reward_standardised
        )  # fmt: skip
        self.reward_members, self.reward_dropout = reward_members, reward_dropout

    def _check_rewards(self) -> None:
        """Raise UserError unless the fields describe heads that this model can have."""
        self._check_form("reward_", self.head_form("shared"))
        _check_heads([*self.reward_heads, *self.task_heads])
        self._check_forms()

    def _check_forms(self) -> None:
        """Raise UserError unless ``task_head_forms`` describes heads that this model can have."""
        if not isinstance(self.task_head_forms, dict):
            raise UserError(f"task_head_forms: expected an object, got {shown(self.task_head_forms)}")
        fields = [field for field in self.head_form("shared") if field != "members"]
        for name, form in self.task_head_forms.items():
            where = f"task_head_forms.{name}"
            if name not in self.task_heads or not isinstance(form, dict) or form.keys() - {"members"} != set(fields):
                raise UserError(f"{where}: expected {', '.join(fields)} of a task head, got {shown(form)}")
            check_integer(f"{where}.intermediate_size", form["intermediate_size"], *SIZES["intermediate_size"])
            self._check_form(f"{where}.", form)

    def _check_form(self, where: str, form: Mapping[str, Any]) -> None:
        """Raise UserError, with the name of the field after ``where``, for a form that no head can have."""
        dropout, standardised = form["dropout"], form["standardised"]
        if not isinstance(dropout, Real) or isinstance(dropout, bool) or not 0 <= dropout < 1:
            raise UserError(f"{where}dropout: expected a probability in [0, 1), got {shown(dropout)}")
        if not isinstance(standardised, bool):
            raise UserError(f"{where}standardised: expected true or false, got {shown(standardised)}")
        _check_layer(f"{where}layer", form["layer"], self.num_hidden_layers)
        check_integer(f"{where}members", form.get("members", 1), 1, MAX_MEMBERS)
        if form["pooler"] not in POOLERS:
            raise UserError(f"{where}pooler: expected one of {', '.join(POOLERS)}, got {shown(form['pooler'])}")

    def head_form(self, group: str) -> dict[str, Any]:
        """Return the form of a group of heads, "shared" or "task_NAME": arguments of ``RewardHead``."""
        form = {
            "pooler": self.reward_pooler,
            "intermediate_size": self.intermediate_size,
            "dropout": self.reward_dropout,
            "layer": self.reward_layer,
            "standardised": self.reward_standardised,
        }
        if self.reward_members != 1:  # earlier versions have no such argument
            form["members"] = self.reward_members
        return self.task_head_forms.get(group.removeprefix("task_"), form) if group.startswith("task_") else form


class ModelConfig(HeadFields, PretrainedConfig):
    """Sizes and switches of :class:`dph.Model`; the defaults are the paper's 551M model (arXiv 2405.20053).

    Args:
        vocab_size: V, rows of the embedding.
        embedding_size: E, width of the embedding, projected up to C and back.
        hidden_size: C, width of the blocks.
        intermediate_size: F, width of the SwiGLU feed-forward and of the SwiGLU pooler.
        num_hidden_layers: number of blocks.
        num_attention_heads: H, query heads of attention.
        num_key_value_heads: K, key heads, each shared by H / K query heads; H if None.
        head_dim: D, width of a head; C / H if None.
        qk_norm: RMSNorm of the queries and keys of each head, before their rotation.
        norm: "layer" for LayerNorm, "rms" for RMSNorm.
        qkv_bias, out_bias, ffn_bias: biases of attention's two products and of the feed-forward network's.
        embedding_projection: whether there are projections between E and C, and a norm after the first; E is C if not.
        tie_word_embeddings: the weight of the language-model head is the embedding.
        rope_base: base of the rotary embedding.
        rotary_scaling: for contexts longer than those of training, in the form of transformers' ``rope_parameters``:
            ``{"rope_type": "linear", "llama3" or "yarn", "factor": ..., ...}``.
        rope_reversed: positions count from the newest token backwards (every angle negated), as in the released models.
        layer_norm_eps: epsilon of every norm.
        initializer_range: standard deviation of fresh weights.
        reward_heads: names of the reward heads that share one pooler; () for none.
        task_heads: names of reward heads with a pooler each (paper 5.2.2).
        task_head_forms: by name of a task head, its pooler, intermediate_size, dropout, layer, standardised and, if not
            1, members, if they are others than the following.
        reward_pooler: identity, bert, t5, swiglu_bert or swiglu_t5.
        reward_layer: number of the block whose input the heads judge; -1 for the states after the output norm. A list
            of several: a learnt mix of them.
        reward_standardised: standardise the judged states by mean and deviation of those of the training answers.
        reward_members: reward vectors of each head, whose mean is the reward (``RewardHead``).
        reward_dropout: dropout of the pooled state (and of the hidden state for the t5 kinds) in training.
        max_position_embeddings: most tokens of a row, but for a :class:`dph.Memory` that is given; None for any number.
        im_end_token_id: id of the end-of-turn token, ``<|im_end|>`` in ChatML, whose hidden state is judged; if None,
            50266 for an embedding of OPT's 50272 rows.
        released: keys of a released ``config.json`` that this model does not use, written back by ``save_official``.
        family: ``model_type`` of the family (``dph.model.families``) that the model comes from.
        family_fields: its ``config.json``, written back by ``save_family``.

    Raises UserError for values of another type or out of range (``SIZES``), sizes that do not divide, unknown poolers,
    and names of heads that are not different, printable names without dots of at most 100 characters; some, such as
    ``values``, are attributes of PyTorch's modules and cannot be used.
    """

    auto_map: ClassVar = AUTO_MAP  # read by other libraries
    model_type = "dph"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers adds a list to it

    def __init__(
        self,
        vocab_size: int = 50_272,
        embedding_size: int = 768,
        hidden_size: int = 1536,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 18,
        num_attention_heads: int = 24,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        norm: str = "layer",
        qkv_bias: bool = True,
        out_bias: bool = True,
        ffn_bias: bool = True,
        embedding_projection: bool = True,
        rope_base: float = 500_000.0,
        rope_reversed: bool = True,
        rotary_scaling: dict[str, Any] | None = None,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        reward_heads: tuple[str, ...] = ("default",),
        task_heads: tuple[str, ...] = (),
        task_head_forms: dict[str, dict[str, Any]] | None = None,
        reward_pooler: str = "swiglu_bert",
        reward_layer: int | list[int] = -1,
        reward_standardised: bool = False,
        reward_members: int = 1,
        reward_dropout: float = 0.1,
        max_position_embeddings: int | None = None,
        im_end_token_id: int | None = None,
        bos_token_id: int | None = 2,
        eos_token_id: int | None = 2,
        pad_token_id: int | None = 1,
        tie_word_embeddings: bool = True,
        released: dict[str, Any] | None = None,
        family: str | None = None,
        family_fields: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = _head_dim(hidden_size, num_attention_heads) if head_dim is None else head_dim
        self.qk_norm = qk_norm
        self.norm = norm
        self.qkv_bias = qkv_bias
        self.out_bias = out_bias
        self.ffn_bias = ffn_bias
        self.embedding_projection = embedding_projection
        self.rope_base = rope_base
        self.rope_reversed = rope_reversed
        self.rotary_scaling = rotary_scaling
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self._set_rewards(
            reward_heads=reward_heads,
            task_heads=task_heads,
            task_head_forms=task_head_forms,
            reward_pooler=reward_pooler,
            reward_layer=reward_layer,
            reward_standardised=reward_standardised,
            reward_members=reward_members,
            reward_dropout=reward_dropout,
        )
        self.max_position_embeddings = max_position_embeddings
        self.im_end_token_id = OPT_END if im_end_token_id is None and vocab_size == OPT_ROWS else im_end_token_id
        self.released = {} if released is None else released
        self.family = family
        self.family_fields = {} if family_fields is None else family_fields
        token_ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        self._check(tie_word_embeddings, token_ids)
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def _check(self, tied: Any, token_ids: Mapping[str, Any]) -> None:
        for name, (least, most) in SIZES.items():
            check_integer(name, getattr(self, name), least, most)
        if self.max_position_embeddings is not None:
            check_integer("max_position_embeddings", self.max_position_embeddings, 1, 2**31 - 1)
        for name in ("rope_base", "layer_norm_eps", "initializer_range", "reward_dropout"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise UserError(f"{name}: expected a finite number, got {shown(value)}")
        if not self.rope_base > 0:
            raise UserError(f"rope_base: expected a number above 0, got {self.rope_base}")
        for name in ("layer_norm_eps", "initializer_range"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        for name, value in (*((name, getattr(self, name)) for name in SWITCHES), ("tie_word_embeddings", tied)):
            if not isinstance(value, bool):
                raise UserError(f"{name}: expected true or false, got {shown(value)}")
        self._check_heads_of_attention()
        if self.norm not in NORMS:
            raise UserError(f"norm: expected one of {', '.join(NORMS)}, got {shown(self.norm)}")
        if not self.embedding_projection and self.embedding_size != self.hidden_size:
            raise UserError(
                f"embedding_size: expected hidden_size = {self.hidden_size} without embedding_projection, "
                f"got {self.embedding_size}"
            )
        scaling_of(self.rotary_scaling)
        self._check_rewards()
        for name, ids in {**token_ids, "im_end_token_id": self.im_end_token_id}.items():
            for token in ids if name == "eos_token_id" and isinstance(ids, list) else [ids]:
                if token is not None:
                    check_integer(name, token, 0, SIZES["vocab_size"][1])
        if self.im_end_token_id is not None and self.im_end_token_id >= self.vocab_size:
            raise UserError(f"im_end_token_id: expected below vocab_size {self.vocab_size}, got {self.im_end_token_id}")
        for name in ("released", "family_fields"):
            if not isinstance(getattr(self, name), dict):
                raise UserError(f"{name}: expected an object, got {shown(getattr(self, name))}")
        if self.family is not None and not isinstance(self.family, str):
            raise UserError(f"family: expected a name, got {shown(self.family)}")

    def _check_heads_of_attention(self) -> None:
        """Raise UserError unless the numbers of heads divide, and each head into two halves."""
        width, heads, key_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if self.family is None and self.head_dim == _head_dim(width, heads) and width % (2 * heads):
            raise UserError(f"hidden_size: expected a multiple of 2 * num_attention_heads = {2 * heads}, got {width}")
        if self.head_dim % 2:
            raise UserError(f"head_dim: expected an even number, got {self.head_dim}")
        if heads % key_heads:
            raise UserError(
                f"num_key_value_heads: expected a divisor of num_attention_heads = {heads}, got {key_heads}"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration with these fields, changed by arguments, as transformers' class does.

        Raises UserError, which begins with the file if it is known, for values as the class does, for settings of
        transformers with other types, and for keys that name code, kernels, other files or methods of this class.
        """
        path = kwargs.get("name_or_path")
        where = _config_file(path) if path else "configuration"
        config_dict = {key: value for key, value in config_dict.items() if (key, value) != ("auto_map", AUTO_MAP)}
        _check_foreign(config_dict, where)
        try:
            result = super().from_dict(config_dict, **kwargs)
        except UserError as error:
            raise UserError(f"{where}: {error}" if path else str(error)) from None
        except Exception as error:  # of transformers, for one of its own settings
            name = _faulty_setting(config_dict)
            got = shown(config_dict.get(name))
            raise UserError(f"{where}: {name}: expected a setting of transformers' type, got {got}") from error
        config = result[0] if isinstance(result, tuple) else result
        token_ids = {name: getattr(config, name) for name in TOKEN_IDS}
        for name in ("reward_heads", "task_heads"):
            setattr(config, name, list_of_names(name, getattr(config, name)))
        config._check(config.tie_word_embeddings, token_ids)  # transformers sets arguments without a check
        return result

    def save_pretrained(self, directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write config.json, and a module that names our classes.

        Programs that were not told of dph find the classes by ``trust_remote_code=True``, where dph is installed.
        """
        self.auto_map = AUTO_MAP  # of the instance: what transformers writes
        try:
            super().save_pretrained(directory, *args, **kwargs)
        finally:
            del self.auto_map
        Path(directory, f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: every saved folder names our classes."""

    @classmethod
    def get_config_dict(cls, path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the fields of ``path``, converted to own names if it is a released directory or one of a family.

        The other arguments are returned with the path as ``name_or_path``, by which errors name the file.
        """
        if os.path.isdir(path):
            read_fields(path, **kwargs)  # for its errors, before transformers reads the file
        fields, rest = super().get_config_dict(path, **kwargs)
        return _own_fields(fields, path, kwargs), {**rest, "name_or_path": str(path)}

    @property
    def block_weights(self) -> int:
        """Number of entries of a block's weight matrices."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        return self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)

    @property
    def projection_weights(self) -> int:
        """Number of entries of the projection between embedding and blocks, in one direction."""
        return self.embedding_size * self.hidden_size if self.embedding_projection else 0

    @property
    def least_parameters(self) -> int:
        """Number of entries of the weight matrices: a lower bound of the parameters, without a model."""
        width, inner = self.hidden_size, self.intermediate_size
        pooler = {"identity": 0, "bert": width**2, "t5": width**2}.get(self.reward_pooler, 3 * width * inner)
        groups = len(self.task_heads) + bool(self.reward_heads)
        tables = self.embedding_size * self.vocab_size * (1 if self.tie_word_embeddings else 2)
        return tables + 2 * self.projection_weights + self.num_hidden_layers * self.block_weights + groups * pooler

    @property
    def memory_kind(self) -> str:
        """Kind of :class:`dph.Memory` that the model was trained with (``recompute_kv`` of a released one)."""
        return "hidden" if self.released.get("recompute_kv") else "kv"

    @property
    def rope(self) -> Rotary:
        """The rotary embedding of every block."""
        return Rotary(self.rope_base, self.rope_reversed, scaling_of(self.rotary_scaling))


def read_fields(path: str | os.PathLike, **options: Any) -> dict[str, Any]:
    """Return the fields of a model's config.json as they are, from a folder or the hub (``options`` for downloads).

    Raises UserError, which begins with the file, if a folder's file is broken or a key names code or another file.
    """
    if os.path.isdir(path):
        fields = read_json(Path(path) / (options.get("subfolder") or "") / "config.json")
    else:
        fields = PretrainedConfig.get_config_dict(path, **hub_arguments(options))[0]
    where = _config_file(path)
    refuse_code(fields, where)
    if not isinstance(fields.get("model_type", ""), str):
        raise UserError(f"{where}: model_type: expected a name, got {shown(fields['model_type'])}")
    if fields.get("configuration_files"):
        raise UserError(f"{where}: configuration_files: expected none, got {shown(fields['configuration_files'])}")
    return fields


def _config_file(path: str | os.PathLike) -> str:
    """Return the name of a folder's config.json for messages; ``path`` may be the file itself."""
    return str(path) if str(path).endswith(".json") else f"{path}/config.json"


def list_of_names(field: str, names: Iterable[str]) -> list[str]:
    """Return names as a list. Raises UserError for a text, and for what is no sequence."""
    if isinstance(names, str | Mapping) or not isinstance(names, Iterable):
        raise UserError(f"{field}: expected a sequence of names, got {shown(names)}")
    return list(names)


def _head_dim(width: Any, heads: Any) -> Any:
    """Return the width of a head of C / H; of sizes of another type 2, since they are refused later."""
    numbers = isinstance(width, Integral) and isinstance(heads, Integral) and heads > 0
    return max(width // heads, 2) if numbers else 2


def check_integer(name: str, value: Any, least: int, most: int) -> None:
    """Raise UserError unless ``value`` is a whole number in [least, most]."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UserError(f"{name}: expected a whole number, got {shown(value)}")
    if value < least:
        raise UserError(f"{name}: expected at least {least}, got {shown(value)}")
    if value > most:
        reason = " (no known model has more)" if name in SIZES else ""
        raise UserError(f"{name}: expected at most {most}{reason}, got {shown(value)}")


def _check_layer(name: str, layer: Any, blocks: int) -> None:
    """Raise UserError unless ``layer`` is the number of a layer that heads can judge, or a list of several."""
    layers = layer if isinstance(layer, list) else [layer]
    for number in layers:
        check_integer(name, number, -1, max(blocks - 1, -1))
    if isinstance(layer, list) and (len(layer) < 2 or len(set(layer)) < len(layer)):
        raise UserError(f"{name}: expected a number, or a list of at least two different ones, got {shown(layer)}")


def _check_heads(names: list[Any]) -> None:
    """Raise UserError unless these are different names that PyTorch can give to modules."""
    field = "reward_heads, task_heads"
    if len(names) > MAX_HEADS:
        raise UserError(f"{field}: expected at most {MAX_HEADS} names, got {len(names)}")
    taken = nn.ModuleDict()
    for name in names:
        if not isinstance(name, str) or not 0 < len(name) <= MAX_HEAD_NAME or "." in name or not name.isprintable():
            expected = f"different names without dots, printable and of 1 to {MAX_HEAD_NAME} characters"
            raise UserError(f"{field}: expected {expected}, got {shown(name)}")
        if hasattr(taken, name):
            raise UserError(f"{field}: expected names that are no attributes of PyTorch's modules, got {shown(name)}")
    if len(set(names)) != len(names):
        raise UserError(f"{field}: expected different names without dots, got {shown(names)}")


def _check_foreign(fields: Mapping[str, Any], where: str) -> None:
    """Raise UserError for keys of a config.json that are no settings of this model, but would change how it loads."""
    _check_foreign_keys(fields, where)
    settings = {field.name for field in dataclasses.fields(PretrainedConfig)}
    for key, value in fields.items():
        attribute = getattr(ModelConfig, key, None)
        if isinstance(attribute, property):
            is_setting = attribute.fset is not None
        else:
            is_setting = key in settings or key == "model_type" or not hasattr(ModelConfig, key)
        if not is_setting:
            raise UserError(f"{where}: {shown(key)}: expected the name of a setting, got that of a method or property")
        if IMPLEMENTATION_KEYS.fullmatch(key) and not isinstance(value, str | dict | None):
            raise UserError(f"{where}: {key}: expected the name of an implementation, got {shown(value)}")


def _check_foreign_keys(fields: Mapping[str, Any], where: str) -> None:
    """Raise UserError for keys that name code, other files or another form of the weights."""
    refuse_code(dict(fields), where)
    for key, value in fields.items():
        if key in FOREIGN_KEYS and value not in (None, {}, []):
            raise UserError(f"{where}: {key}: expected none (it does not fit this model), got {shown(value)}")
        if key in ("dtype", "torch_dtype") and value is not None:
            dtype = str(value).removeprefix("torch.")
            if dtype not in DTYPES:
                raise UserError(f"{where}: {key}: expected one of {', '.join(DTYPES)}, got {shown(value)}")


def _faulty_setting(fields: Mapping[str, Any]) -> str:
    """Return the first key that transformers refuses by itself; all keys together if it refuses none."""
    for key, value in fields.items():
        try:
            ModelConfig(**{key: value})
        except UserError:
            continue  # of our own settings, of which one alone may not fit the default sizes
        except Exception:
            return key
    return ", ".join(list(fields)[:8])


class ReleasedConfig(ModelConfig):
    """Registered with transformers for released configurations, which it reads as a :class:`ModelConfig`."""

    model_type = RELEASED

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return a :class:`ModelConfig`, with ``return_unused_kwargs`` also the unused arguments; errors as there."""
        return ModelConfig.from_dict(_own_fields(config_dict, kwargs.get("name_or_path"), kwargs), **kwargs)


def check_fields(fields: dict[str, Any], path: str | os.PathLike) -> None:
    """Raise UserError, as :class:`ModelConfig` does, for wrong fields of a model in ``path``, if it opens here."""
    if fields.get("model_type") in (RELEASED, ModelConfig.model_type, *FAMILIES):
        ModelConfig.from_dict(dict(_renamed(fields, path)), name_or_path=str(path))


def _own_fields(fields: dict[str, Any], path: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Convert released or a family's fields to own names, and add the id of ``<|im_end|>`` from the tokenizer.

    For a family only if the chat template contains it: ``dph.model.loading.check_tokenizer`` adds the end-of-turn token
    of other formats.
    """
    own = _renamed(fields, path)
    if own is not fields and own.get("im_end_token_id") is None and path is not None:
        hub = hub_arguments(options)
        path = Path(path).parent if os.path.isfile(path) else path
        if fields.get("model_type") == RELEASED or END in _chat_template(path, hub):
            own["im_end_token_id"] = _end_token(path, **hub)
    return own


def _chat_template(path: str | os.PathLike, hub: dict[str, Any]) -> str:
    """Return the chat template of a model's tokenizer; "" if it has none, or several."""
    if file := find_file("chat_template.jinja", path, hub, offline=True):
        return read_text(file)
    file = find_file("tokenizer_config.json", path, hub, offline=True)
    template = read_json(file).get("chat_template") if file else None
    return template if isinstance(template, str) else ""


def _renamed(fields: dict[str, Any], path: Any) -> dict[str, Any]:
    """Convert released or a family's fields to own names; others are returned as they are."""
    kind = fields.get("model_type")
    if kind != RELEASED and kind not in FAMILIES:
        return fields
    where = _config_file(path) if path is not None else "config.json"
    if kind in FAMILIES:
        _check_foreign_keys(fields, where)
        try:
            return {**own_fields(FAMILIES[kind], fields), "model_type": ModelConfig.model_type}
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    _check_foreign(fields, where)
    try:
        return {**config_from_official(fields), "model_type": ModelConfig.model_type}
    except ValueError as error:
        raise UserError(str(error).replace("config.json", where, 1)) from None


def _end_token(path: str | os.PathLike, **hub: Any) -> int | None:
    """Return the id of ``<|im_end|>`` in a model's ``tokenizer.json``, on disk or hub; None if it has none.

    Raises UserError, which begins with the file, if it is broken.
    """
    file = find_file("tokenizer.json", path, hub, offline=True)
    if file is None:
        return None
    tokens = read_json(file).get("added_tokens")
    for token in tokens if isinstance(tokens, list) else ():
        if isinstance(token, dict) and token.get("content") == END:
            if not isinstance(token.get("id"), int):
                raise UserError(f"{file}: added_tokens: expected a number as id of {END}, got {shown(token)}")
            return token["id"]
    return None


def hub_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for downloads among ``options``."""
    return {name: options[name] for name in HUB_ARGUMENTS if name in options}


def with_config(path: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of ``from_pretrained`` in which fields of the configuration have moved into ``config``."""
    config = kwargs.get("config")
    if isinstance(config, ModelConfig):
        return kwargs
    if isinstance(config, PretrainedConfig):
        raise UserError(f"config: expected a dph.ModelConfig, or the path of one, got a {type(config).__name__}")
    source = config or path
    fields = {name: value for name, value in kwargs.items() if name not in ("config", "dtype")}
    config, rest = ModelConfig.from_pretrained(source, return_unused_kwargs=True, **fields)
    if "dtype" in kwargs:  # of the weights, not a field
        rest = {"dtype": kwargs["dtype"], **rest}
    return {**rest, "config": config}


for _config in (ModelConfig, ReleasedConfig):
    AutoConfig.register(_config.model_type, _config)
