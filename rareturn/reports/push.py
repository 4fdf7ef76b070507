"""Pushing what a training script made: complete folds, then the run's card."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rareturn.command_line import HubArguments
from rareturn.errors import InputError
from rareturn.reports.cards import card_facts, eval_results, run_card, run_results
from rareturn.runs.folder import complete_folds, read_run_info
from rareturn.runs.hub import check_may_push
from rareturn.runs.publish import push_fold, push_run
from rareturn.runs.references import model_repo, table_repo

logger = logging.getLogger(__name__)


def check_push(hub: HubArguments, run: str) -> None:
    """Where a run is to be pushed, `check_may_push` for both its repos, before anything is computed."""
    if hub.push_to_hub:
        check_may_push(model_repo(hub.hub_namespace, hub.hub_name, run))
        check_may_push(table_repo(hub.hub_namespace, hub.hub_name), "dataset")


def push_folds(run_dir: Path, hub: HubArguments, folds: Sequence[int] | None = None) -> None:
    """Push complete folds (None: all of them) and the card of the run, which covers every fold that is complete by then."""
    info = read_run_info(run_dir) if (run_dir / "run.json").exists() else {"num_folds": 0}
    folds = complete_folds(run_dir, info["num_folds"]) if folds is None else folds
    if not folds:
        raise InputError(f"{run_dir}: no fold is complete, so there is nothing to push")
    where, private = (hub.hub_namespace, hub.hub_name), hub.hub_private_repo
    if Path(info["base_model"]).is_dir():
        what = "others can blend its tables, but not load its models"
        logger.warning(f"{run_dir}: its base model is a folder of this machine: {what}")
    shas: dict[str, str] = {}
    for fold in folds:
        shas |= push_fold(run_dir, fold, *where, private=private)
    results, repo_id = run_results(run_dir, info), model_repo(*where, info["name"])
    card, scores = run_card(info, results, repo_id), eval_results([info], results, repo_id)
    shas |= push_run(
        run_dir, *where, model_card=card, facts=card_facts([info]), files=scores, private=private
    )
    for repo, sha in shas.items():
        print(f"pushed fold {', '.join(map(str, folds))} of {info['name']} to {repo} at {sha}")
