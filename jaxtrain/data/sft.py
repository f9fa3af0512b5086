"""Supervised fine-tuning: packed conversations with loss on what the assistant says."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jaxtrain.data.documents import Documents
from jaxtrain.data.encode import ConversationEncoder, Encoder, TokenisedEncoder
from jaxtrain.data.factory import DataFactory, PackedSet
from jaxtrain.data.packing import PackingPlan, cut_documents, pack
from jaxtrain.data.plan import BatchPlan, choose_fused
from jaxtrain.data.source import LoadedSource
from jaxtrain.recipe.data import SFTDataConfig
from jaxtrain.recipe.errors import DataError


class SFTDataFactory(DataFactory):
    name = "sft"
    config: SFTDataConfig
    retired = DataFactory.retired | dict.fromkeys(
        ("get_masked_labels", "get_assistant_start_end_indices", "tokenize_messages"),
        "trained text is found in the rendered template; for other records define `encoder`",
    )

    def encoder(self, loaded: LoadedSource) -> Encoder:
        if loaded.source.config.is_tokenised:
            return TokenisedEncoder(
                vocab_size=len(self.tokenizer),
                with_labels=True,
                max_length=self.max_length,
                overlong=self.config.overlong_rule,
            )
        return ConversationEncoder(
            self.tokenizer,
            max_length=self.max_length,
            overlong=self.config.overlong_rule,
            mask_inputs=self.config.mask_inputs,
            loss_roles=self.config.loss_roles,
            completion_only=self.config.completion_only,
            ignore_empty_think=self.config.ignore_empty_think,
            split_special_tokens=self.config.split_special_tokens,
        )

    def key_parts(self, loaded: Sequence[LoadedSource]) -> dict[str, str]:
        return {**super().key_parts(loaded), "max_length": str(self.max_length)}

    def plan_packing(self, documents: Documents, chosen: np.ndarray, *, train: bool) -> PackingPlan:
        config = self.config
        if not config.pack_samples:
            return pack(documents.lengths, self.max_length, "none", chosen)
        if train and config.repeat_to_pack_max_length:
            total = int(documents.lengths[chosen].sum())
            chosen = np.tile(chosen, max(1, self.max_length // total))
        if config.always_max_length:
            plan = cut_documents(documents.lengths, self.max_length, chosen)
        else:
            plan = pack(documents.lengths, self.max_length, config.packing, chosen)
        return self._drop_short_pack(plan) if train and config.drop_last else plan

    def _drop_short_pack(self, plan: PackingPlan) -> PackingPlan:
        """Drops the pack that holds the rest: the last in order, or the shortest of best-fit."""
        in_order = self.config.always_max_length or self.config.packing == "next_fit"
        short = plan.num_sequences - 1 if in_order else int(np.argmin(plan.sequence_lengths))
        if plan.sequence_lengths[short] == self.max_length:
            return plan
        if plan.num_sequences == 1:
            raise DataError(
                f"data.drop_last would drop the only pack, which has {plan.sequence_lengths[0]} of "
                f"{self.max_length} tokens; set it to false"
            )
        return plan.drop(short)

    @property
    def length_multiple(self) -> int | None:
        config = self.config
        if config.pack_samples or config.pad_to == "max_length":
            return None
        return config.div_length

    def create_dataloader(self, dataset: PackedSet) -> BatchPlan:
        """Plans the batches of one set; an evaluation set keeps its order and fuses nothing."""
        plan = super().create_dataloader(dataset)
        share = self.config.fuse_positions_prob
        if not dataset.is_train or not share:
            return plan
        fused = choose_fused(plan.packing.num_sequences, share, self.config.seed)
        return replace(plan, fused=fused)
