"""The Python call behind each command, for ``--help`` and the reference.

Whatever the command line does, a script or a notebook can do: each command parses its
options, makes this call, and prints the answer.
"""

from __future__ import annotations

import argparse

# Command -> module:function, or module:Class.method.
PYTHON_CALLS: dict[str, str] = {
    "demo": "nanoos_fw.demo:run",
    "import": "nanoos_fw.operations:import_structures",
    "import-table": "nanoos_fw.operations:import_property_table",
    "status": "nanoos_fw.operations.status:campaign_status",
    "report": "nanoos_fw.reports:write_report",
    "features compute": "nanoos_fw.firetasks.featurization:compute_features",
    "features status": "nanoos_fw.stores.features:FeatureStore.status",
    "features show": "nanoos_fw.stores.features:FeatureStore.entries",
    "dataset build": "nanoos_fw.stores.datasets:build_train_val_datasets",
    "dataset show": "nanoos_fw.ml.datasets:open_dataset",
    "dataset export": "nanoos_fw.ml.exports:export_dataset",
    "train run": "nanoos_fw.ml.training:train_cgcnn_model",
    "train submit": "nanoos_fw.operations.trainings:submit_training",
    "models list": "nanoos_fw.stores.models:list_models",
    "models show": "nanoos_fw.stores.models:ModelRegistry.get",
    "models compare": "nanoos_fw.stores.models:compare_models",
    "models activate": "nanoos_fw.stores.models:ModelRegistry.activate",
    "models deactivate": "nanoos_fw.stores.models:ModelRegistry.deactivate",
    "models rollback": "nanoos_fw.stores.models:ModelRegistry.roll_back",
    "models export": "nanoos_fw.stores.model_upkeep:export_model",
    "models verify": "nanoos_fw.stores.model_upkeep:verify_models",
    "models gc": "nanoos_fw.stores.model_upkeep:collect_garbage",
    "models import-cgcnn": "nanoos_fw.operations.models:import_checkpoint",
    "models calibrate": "nanoos_fw.operations.models:calibrate_registered",
    "search create": "nanoos_fw.operations.searches:create_search",
    "search resume": "nanoos_fw.operations.searches:resume_search",
    "search status": "nanoos_fw.stores.search_records:SearchRecords.status",
    "search best": "nanoos_fw.stores.search_records:SearchRecords.status",
    "search stop": "nanoos_fw.stores.search_records:SearchRecords.stop",
    "screen pack": "nanoos_fw.ml.candidate_packs:write_pack",
    "screen run": "nanoos_fw.firetasks.screening:run_window",
    "screen submit": "nanoos_fw.operations.screens:submit_screen",
    "screen status": "nanoos_fw.stores.screens:ScreenStore.progress",
    "screen verify": "nanoos_fw.stores.screens:ScreenStore.proof",
    "screen top": "nanoos_fw.ml.ranking:rank_top",
    "screen export": "nanoos_fw.operations.screen_exports:export_screen",
    "screen report": "nanoos_fw.reports:write_screen_report",
    "active template": "nanoos_fw.templates:load_template",
    "active check": "nanoos_fw.firetasks.active_rounds:check_labelling",
    "active submit": "nanoos_fw.operations.active:submit_active",
    "active status": "nanoos_fw.operations.active:active_status",
    "active import": "nanoos_fw.operations.active:import_labels",
    "active fail": "nanoos_fw.operations.active:fail_labels",
    "active continue": "nanoos_fw.operations.active:continue_active",
    "active stop": "nanoos_fw.operations.active:stop_active",
    "active extend": "nanoos_fw.operations.active:extend_active",
    "export predictions": "nanoos_fw.operations.result_exports:export_predictions",
    "export simulations": "nanoos_fw.operations.result_exports:export_simulations",
    "import-results": "nanoos_fw.operations.result_exports:import_results",
    "potentials list": "nanoos_fw.md.catalogue:Catalogue.covering",
    "potentials show": "nanoos_fw.md.catalogue:Catalogue.resolve",
    "potentials check": "nanoos_fw.md.potential_checks:check_potential",
    "md run": "nanoos_fw.md.engine:LAMMPSEngine.run",
    "md submit": "nanoos_fw.operations.simulations:submit_simulation",
    "md status": "nanoos_fw.operations.simulation_folders:simulation_status",
    "md analyze": "nanoos_fw.md.analysis:analyze_simulation",
    "md plot": "nanoos_fw.operations.simulation_folders:plot_run",
    "md export": "nanoos_fw.md.exports:export_simulation",
    "template list": "nanoos_fw.md.workflow_files:shipped_workflows",
    "template show": "nanoos_fw.md.workflow_files:workflow_text",
    "template validate": "nanoos_fw.md.workflow_files:plan_workflow",
    "template render": "nanoos_fw.md.workflow_files:render_workflow",
    "init": "nanoos_fw.operations.cluster_files:write_cluster_files",
    "preflight": "nanoos_fw.operations.preflight:preflight",
    "work": "nanoos_fw.operations.workers:work",
    "reconcile": "nanoos_fw.operations.reconcile:reconcile",
    "rerun": "nanoos_fw.operations.rerun:rerun_failed_fireworks",
    "campaign create": "nanoos_fw.operations.campaigns:create",
    "campaign submit": "nanoos_fw.operations.campaigns:submit",
    "campaign status": "nanoos_fw.operations.status:campaign_status",
    "campaign pause": "nanoos_fw.operations.campaigns:pause",
    "campaign resume": "nanoos_fw.operations.campaigns:resume",
    "campaign cancel": "nanoos_fw.operations.campaigns:cancel",
    "campaign archive": "nanoos_fw.operations.archives:archive",
    "gc": "nanoos_fw.operations.retention:collect_waste",
    "db status": "nanoos_fw.stores.migrations:database_status",
    "db migrate": "nanoos_fw.stores.migrations:migrate",
    "serve": "nanoos_fw.web:serve",
}


def commands(
    parser: argparse.ArgumentParser | None = None, words: str = ""
) -> dict[str, argparse.ArgumentParser]:
    """Return all commands that do something, with their parsers.

    Parameters
    ----------
    parser
        Whose commands; None for that of the whole command line.
    words
        The command of this parser.
    """
    if parser is None:
        from nanoos_fw.cli import _parser

        parser = _parser()
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                found.update(commands(below, f"{words} {name}".strip()))
    return found or {words: parser}
