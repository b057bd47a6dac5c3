"""Pages for people: what runs, what came of it, and which models there are."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jinja2
from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse

from nanoos_fw.templates import load_template
from nanoos_fw.web.api import NotFoundError, existing, require_writing, state_of

_SHOWN = 200

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


@router.get("/")
def campaigns(request: Request) -> HTMLResponse:
    """Show all campaigns with their fireworks by stage and state."""
    from nanoos_fw.operations.status import campaign_status
    from nanoos_fw.stores.campaigns import CampaignStore

    state = state_of(request)
    with state.lock:
        names = CampaignStore(state.database).names()
        found = [campaign_status(state.database, name) for name in names]
    return page(request, "campaigns", campaigns=found)


@router.get("/campaigns/{name}")
def campaign(name: str, request: Request) -> HTMLResponse:
    """Show one campaign: progress, what failed and why."""
    from nanoos_fw.operations.status import campaign_status
    from nanoos_fw.stores.campaigns import CampaignStore
    from nanoos_fw.stores.launches import failed_fireworks, stage_times

    state = state_of(request)
    with state.lock:
        document = existing(lambda: CampaignStore(state.database).get(name))
        status = campaign_status(state.database, name)
        failures = failed_fireworks(state.database, name)
        times, hosts = stage_times(state.database, name)
    return page(
        request,
        "campaign",
        name=name,
        created=document["created"],
        status=status,
        failures=failures[:_SHOWN],
        n_failures=len(failures),
        times={time.stage: time for time in times},
        hosts=hosts,
    )


@router.get("/campaigns/{name}/report")
def campaign_report(name: str, request: Request) -> HTMLResponse:
    """Show the report of a campaign as the stores have it now."""
    from nanoos_fw.reports.collect import collect_report
    from nanoos_fw.reports.page import render_report

    state = state_of(request)
    with state.lock:
        data = existing(lambda: collect_report(state.database, name))
    return HTMLResponse(render_report(data))


@router.get("/models")
def models(request: Request, select: str = "") -> HTMLResponse:
    """Show all models; ``select`` are references to compare, with commas between."""
    from nanoos_fw.stores.models import ModelRegistry, compare_models, metric_of

    state = state_of(request)
    with state.lock:
        registry = ModelRegistry(state.database)
        records = registry.list_models()
        names = dict.fromkeys(part for part in select.split(",") if part)
        chosen = existing(lambda: [registry.get(name) for name in names])
    compared = compare_models(chosen, "mae", "val") if len(chosen) > 1 else None
    rows = [
        {
            "record": record,
            "metrics": {
                part: {name: metric_of(record, name, part) for name in ("mae", "r2")}
                for part in ("val", "test")
            },
        }
        for record in records
    ]
    return page(
        request,
        "models",
        models=rows,
        compared=compared,
        selected={record.reference for record in chosen},
        may_write=state.may_write,
    )


@router.post("/models/compare")
def compare(references: list[str] = Form(default=[])) -> RedirectResponse:  # noqa: B008
    """Turn the ticked boxes into an address."""
    from urllib.parse import quote

    return RedirectResponse(f"/models?select={quote(','.join(references))}", 303)


@router.post("/models/activate")
def activate(
    request: Request,
    reference: str = Form(),
    reason: str = Form(default="activated on the web page"),
) -> RedirectResponse:
    """Point ``active`` at a version, as ``nanoos models activate`` does."""
    from nanoos_fw.stores.models import ModelRegistry

    state = state_of(request)
    require_writing(state)
    with state.lock:
        registry = ModelRegistry(state.database)
        record = existing(lambda: registry.get(reference))
        registry.activate(record.reference, reason=reason)
        state.save()
    return RedirectResponse("/models", 303)


@router.get("/runs")
def runs(request: Request) -> HTMLResponse:
    """Show the newest molecular dynamics runs."""
    from nanoos_fw.stores.simulations import SimulationStore
    from nanoos_fw.stores.structures import StructureStore

    state = state_of(request)
    with state.lock:
        found = SimulationStore(state.database).newest("md", _SHOWN)
        formulas = StructureStore(state.database).formulas(
            [simulation.structure for simulation in found]
        )
    return page(request, "runs", runs=found, formulas=formulas)


@router.get("/runs/{key}")
def run(key: str, request: Request) -> HTMLResponse:
    """Show one run with its plots."""
    from nanoos_fw.md.protocols import STILL_WORKFLOWS
    from nanoos_fw.reports.page import render_run
    from nanoos_fw.reports.panels import md_panel
    from nanoos_fw.stores.database import get_artifact
    from nanoos_fw.stores.simulations import SimulationStore
    from nanoos_fw.stores.structures import StructureStore

    state = state_of(request)
    with state.lock:
        simulation = SimulationStore(state.database).by_key(key)
        if simulation is None or simulation.kind != "md":
            raise NotFoundError(f"there is no run {key!r}", advice="see /runs")
        entry = StructureStore(state.database).get_many([simulation.structure])
        stored = entry[simulation.structure]
        still = simulation.result.get("workflow_type") in STILL_WORKFLOWS
        if simulation.status != "done" or still:
            return page(
                request,
                "run",
                run=simulation,
                formula=stored.formula,
                numbers=_numbers(simulation.result),
            )
        panel = md_panel(
            1, stored, simulation, lambda digest: get_artifact(state.database, digest)
        )
    return HTMLResponse(render_run(panel, "/runs"))


@router.get("/features")
def features(request: Request) -> HTMLResponse:
    """Show how far the features of the named sets are."""
    from nanoos_fw.firetasks.featurization import FeatureParameters
    from nanoos_fw.ml.features import FEATURE_VERSION
    from nanoos_fw.stores.features import FeatureStore
    from nanoos_fw.stores.structures import StructureStore

    state = state_of(request)
    with state.lock:
        store = StructureStore(state.database)
        described = FeatureParameters().model_dump(mode="json")
        rows = []
        for name in store.sets():
            keys = store.keys(name)
            status = FeatureStore(state.database).status(
                keys, described, FEATURE_VERSION
            )
            counts = Counter(entry.state for entry in status.values())
            rows.append({"name": name, "total": len(keys), "counts": counts})
    return page(
        request,
        "features",
        sets=rows,
        version=FEATURE_VERSION,
        described=described,
    )


# ------------------------------------------------------------------------ rendering


def page(request: Request, name: str, /, **values: Any) -> HTMLResponse:
    """Return a page of the templates, with a policy for exactly its script."""
    environment = _environment()
    script = load_template("web/page.js")
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template(f"{name}.html").render(
        path=request.url.path,
        style=load_template("web/style.css"),
        script=script,
        **values,
    )
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'self'"
    )
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


def _numbers(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return what a simulation without steps in time found, by name with its unit."""
    left_out = {"workflow_type", "thermo", "units", "averages", "final_structure"}
    # Nothing moves in time.
    left_out |= {"timestep_fs", "equilibration_steps", "temperature_k", "seed"}
    units = {"final_energy": "eV", "final_potential_energy": "eV"}
    rows = []
    for name, value in result.items():
        if name in left_out:
            continue
        inside = value.items() if isinstance(value, Mapping) else [("", value)]
        for part, number in inside:
            if number is None or number == []:
                continue
            label = f"{name}: {part}" if part else name
            label += f" ({units[name]})" if name in units else ""
            rows.append((label, number))
    return rows


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: load_template(f"web/{name}")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
