"""Checks before anything is loaded: can the requests be asked, and can their adapters be fitted and stored?"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ttt_harness.adapters.prune import keep_below
from ttt_harness.adapters.size import adapter_bytes, parse_size, size_text
from ttt_harness.adapters.store import AdapterStore
from ttt_harness.config import TTTConfig
from ttt_harness.records import TaskRecord
from ttt_harness.run.evaluation import Evaluation
from ttt_harness.run.fitter import record_of
from ttt_harness.run.groups import Group, Preparation, group_by_task
from ttt_harness.run.local import fit_settings, stated_settings
from ttt_harness.run.model_arguments import ModelArguments
from ttt_harness.serving.answering import Answering, Checked

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preflight:
    """Checks requests and prepares their evaluation.

    arguments: of the model.
    answering: tokenizes and checks requests exactly as they are answered.
    store: where adapters are.
    base_model: the hash of the base model's weights, once it is there.
    """

    arguments: ModelArguments
    answering: Answering
    store: AdapterStore
    base_model: Future[str]

    def evaluation(
        self,
        requests: Sequence[Any],
        kind: str,
        *,
        is_fitted: Callable[[Group], bool],
        keep: Callable[[Sequence[Any], Sequence[Any]], None],
    ) -> tuple[Evaluation, Mapping[str, Checked]]:
        """Group the requests, check them, and work out what has to be fitted.

        Args:
            requests: lm-eval's instances.
            kind: the method of lm-eval's that answers them.
            is_fitted: whether a group is answered with an adapter; may refuse the group.
            keep: see `Evaluation`.

        Returns:
            The evaluation, and what results have to state of each task's requests.

        Raises:
            TTTError: a task cannot be fitted or asked, or the adapters do not fit on the disk.
        """
        config = self.arguments.config
        requests = self.answering.seeded(kind, requests, seed=config.seed)
        groups = group_by_task(requests)
        fitted = [group for group in groups if is_fitted(group)]
        checked = {
            group.task: self.answering.check(
                kind,
                [requests[index] for index in group.indices],
                fitted=group in fitted,
                truncate=config.truncate,
            )
            for group in groups
        }
        if fitted:
            self._prepare(fitted)
        evaluation = Evaluation(
            groups,
            requests,
            kind,
            stored=self._stored(fitted),
            store=str(self.store.root),
            keep=keep,
        )
        self._check_room(fitted, evaluation.to_fit)
        return evaluation, checked

    def fits(
        self, requests: Sequence[Any], *, is_fitted: Callable[[Group, str], bool]
    ) -> tuple[Evaluation, dict[str, str]]:
        """Work out what has to be fitted for requests that nobody answers.

        Args:
            requests: lm-eval's instances, of any kinds.
            is_fitted: whether a group is answered with an adapter, by lm-eval's method of that name.

        Returns:
            The evaluation, which has no questions, and task -> key of its adapter.

        Raises:
            TTTError: as `evaluation`.
        """
        groups = []
        for group in group_by_task(requests):
            own = [requests[index] for index in group.indices]
            kind = str(own[0].request_type)
            if is_fitted(group, kind):
                self.answering.check(kind, own, fitted=True, truncate=self.arguments.config.truncate)
                group.indices = []
                groups.append(group)
        self._prepare(groups)
        evaluation = Evaluation(groups, [], "", stored=self._stored(groups), store=str(self.store.root))
        self._check_room(groups, evaluation.to_fit)
        return evaluation, {group.task: group.key for group in groups if group.key is not None}

    def _prepare(self, groups: Sequence[Group]) -> None:
        """Give the groups their training sequences and keys, those with the same settings together."""
        alike: list[tuple[TTTConfig, list[Group]]] = []
        for group in groups:
            config = self.arguments.config_of(group.task)
            same = next((same for one, same in alike if one == config), None)
            if same is None:
                alike.append((config, same := []))
            same.append(group)
            if self.arguments.tuned is not None and group.support is not None:
                self.arguments.tuned.check_demonstrations(group.task, len(group.support.demonstrations))
        for config, same in alike:
            self._prepare_alike(same, config)

    def _prepare_alike(self, groups: Sequence[Group], config: TTTConfig) -> None:
        answering, shape = self.answering, self.arguments.shape
        assert shape is not None
        settings, of_context = fit_settings(config, answering.dtype_name), shape.determinants(answering.max_length)
        Preparation(
            method=config.how,
            name=config.method,
            encode=answering.encode,
            render=answering.render_chat,
            max_length=answering.max_length,
            num_permutations=config.num_permutations,
            shuffle=config.shuffle,
            seed=config.seed,
            loss_on=config.loss_on,
            determinants=lambda sequences: settings.determinants(self.base_model.result(), sequences) | of_context,
        ).prepare(groups)
        for group in groups:
            group.settings, group.said = settings, stated_settings(config)
            for sequence in group.sequences:
                shape.check_tokens(sequence.tokens, what=f"{group.task}: a training sequence")

    def _stored(self, groups: Sequence[Group]) -> dict[str, TaskRecord]:
        """The records of those adapters that are in the store."""
        found = {}
        for key in dict.fromkeys(group.key for group in groups if group.key):
            if adapter := self.store.load(key):
                found[key] = record_of(adapter, reused=True)
        return found

    def _check_room(self, groups: Sequence[Group], to_fit: Collection[str]) -> None:
        """Say what the adapters that have to be fitted take on disk, and keep the store below its limit.

        Raises:
            StoreError: there is no room for them.
        """
        if not to_fit:
            return
        config = self.arguments.config
        assert self.arguments.shape is not None
        needed = len(to_fit) * adapter_bytes(self.arguments.shape, config.lora_rank, self.answering.dtype)
        if config.adapter_limit is not None:
            limit = parse_size(config.adapter_limit, of="adapter_limit")
            used = {group.key for group in groups if group.key}
            for entry in keep_below(self.store, limit, needed=needed, keep=used):
                _log.info("The adapter %s (%s) is removed, for adapter_limit=.", entry.key, entry.task)
        free = self.store.check_room(needed)
        _log.info(
            "%d adapters to fit take %s in %s; %s are free.",
            len(to_fit),
            size_text(needed),
            self.store.root,
            size_text(free),
        )
