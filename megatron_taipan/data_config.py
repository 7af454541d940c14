"""Options of the data: sources, how they are blended, and what a sample is."""

from typing import Any, Literal

from pydantic import ValidationInfo, field_validator, model_validator

from megatron_taipan.section import Section, option


class DataSource(Section):
    """One tokenized dataset of a blend."""

    prefix: str = option(
        ...,
        "path of the .bin/.idx pair without its ending, of the shards of one output without -00000, or a glob over"
        " prefixes",
    )
    weight: float | Literal["tokens"] = option(
        1.0, "share of the blend, relative to the others; tokens: by size, for all sources or none"
    )
    loss_mask: Literal["auto", "require", "ignore"] = option(
        "auto",
        "auto: only the tokens that PREFIX_loss_mask marks are learned, all where there is none; require: an error"
        " where there is none; ignore: all are learned",
    )

    set: str | None = option(None, "of data.valid: the named set that it belongs to")

    @field_validator("weight", mode="before")
    @classmethod
    def _positive(cls, weight: Any) -> Any:
        """Checked here, since pydantic would report a fault of a union twice."""
        if weight == "tokens":
            return weight
        try:
            number = float(weight)
        except (TypeError, ValueError):
            raise ValueError(f"{weight!r} is neither a number nor `tokens` (by size)") from None
        if not 0 < number < float("inf"):
            raise ValueError(f"{weight} must be above 0 and finite")
        return number


class DataConfig(Section):
    """What is read, and in which order."""

    train: list[DataSource] = option(
        ...,
        "tokenized datasets to train on: a prefix, or a list of prefixes or of {prefix: P, weight: 1.0, loss_mask:"
        " auto}; {prefix: [P, Q], weight: tokens} weights a list by size; the shards of one output are one source, by"
        " its prefix or a glob; auto: where PREFIX_loss_mask.idx exists only the tokens that it marks are learned;"
        " require: it must exist; ignore: all tokens are learned",
        min_length=1,
    )
    valid: list[DataSource] | None = option(
        None,
        "datasets to validate on, as for train; {wiki: P, code: [Q, R]}: sets by name, each with its own curve; null"
        " takes valid_fraction of each of train",
        min_length=1,
    )
    valid_fraction: float = option(0.02, "documents held out for validation when data.valid is null", ge=0, lt=1)
    seq_len: int = option(4096, "tokens per sample", ge=1)
    seed: int = option(1234, "seed of the sample order", ge=0)
    tokenizer: str | None = option(None, "tokenizer file that the data was made with; copied into exports")
    mask_documents: bool = option(True, "documents packed into one sample never see each other (seq_idx)")
    one_document: bool = option(
        False, "every sample is inside one document of more than seq_len tokens; shorter ones are left out"
    )
    verify: bool = option(
        False,
        "read every byte of the data before the run and compare it with the checksums in the manifests; the files are"
        " spread over all ranks",
    )
    workers: int = option(0, "loader processes per rank; 0 loads in the training process", ge=0)

    @field_validator("train", "valid", mode="before")
    @classmethod
    def _short_forms(cls, value: Any, info: ValidationInfo) -> Any:
        """A path, or a list of paths, means sources of equal weight, {prefix: [P, Q], weight: tokens} several by
        size, {name: P} of data.valid named sets."""
        if isinstance(value, dict) and "prefix" not in value:
            if info.field_name == "train":
                raise ValueError(f"{value!r} has no prefix; give the path of a .bin/.idx pair, or a list of them")
            return [{"set": name, **one} for name, given in value.items() for one in cls._short_forms(given, info)]
        if isinstance(value, str | dict):
            value = [value]
        if isinstance(value, list):
            value = [{"prefix": v} if isinstance(v, str) else v for v in value]
            value = [one for v in value for one in _spread(v)]
        return value

    @field_validator("train", "valid")
    @classmethod
    def _one_measure(cls, sources: list[DataSource] | None) -> list[DataSource] | None:
        for name in dict.fromkeys(source.set for source in sources or []):
            blend = [source for source in sources or [] if source.set == name]
            by_size = [source for source in blend if source.weight == "tokens"]
            if by_size and len(by_size) < len(blend):
                raise ValueError(
                    f"{len(by_size)} of {len(blend)} sources have weight: tokens (the first is {by_size[0].prefix})"
                    " and the others a number, which cannot be compared: give all of them `tokens`, or all a number"
                )
        return sources

    @model_validator(mode="after")
    def _all_named_or_none(self) -> "DataConfig":
        if named := [source.prefix for source in self.train if source.set is not None]:
            raise ValueError(f"train: {named[0]} has a set, which only sources of data.valid have; remove it")
        unnamed = [source.prefix for source in self.valid or [] if source.set is None]
        if unnamed and len(unnamed) < len(self.valid or []):
            raise ValueError(f"valid: {unnamed[0]} belongs to no set and others do; give {{name: prefix}} for all")
        return self

    def valid_sets(self) -> dict[str | None, "DataConfig"]:
        """For each set of data.valid by name, the data with that set as its data.valid; else {None: the data}."""
        names = dict.fromkeys(source.set for source in self.valid or [])
        if not names or None in names:  # all sources are named, or none is
            return {None: self}
        return {
            name: self.model_copy(update={"valid": [s for s in self.valid or [] if s.set == name]}) for name in names
        }


def _spread(source: Any) -> list[Any]:
    """The sources of an entry whose prefix is a list; they must be weighted by size, since a number could be the weight
    of each or of all."""
    if not isinstance(source, dict) or not isinstance(source.get("prefix"), list):
        return [source]
    if source.get("weight") != "tokens":
        raise ValueError("a list of prefixes in one entry needs weight: tokens; give each its own entry and weight")
    return [source | {"prefix": prefix} for prefix in source["prefix"]]
