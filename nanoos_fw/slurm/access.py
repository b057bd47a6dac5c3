"""Who may use a partition: its lists of groups, accounts and qualities of service.

SLURM refuses some of these jobs and leaves others pending for ever, with a reason that
nobody sees before looking at the queue. Only what is certain counts as a problem: where
accounting does not tell the user's accounts, the lists of accounts are not held against
the request.
"""

from __future__ import annotations

import getpass
import grp
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nanoos_fw.errors import LaunchError, MissingDependencyError
from nanoos_fw.slurm.commands import run_slurm
from nanoos_fw.slurm.request import SlurmRequest


@dataclass(frozen=True)
class Access:
    """Who may use a partition; None where a list allows all.

    Parameters
    ----------
    allow_groups, allow_accounts, allow_qos
        SLURM's ``AllowGroups``, ``AllowAccounts``, ``AllowQos``.
    deny_accounts, deny_qos
        SLURM's ``DenyAccounts``, ``DenyQos``.
    root_only
        Whether nobody but root may submit.
    needs_reservation
        SLURM's ``ReqResv``.
    """

    allow_groups: frozenset[str] | None = None
    allow_accounts: frozenset[str] | None = None
    deny_accounts: frozenset[str] = frozenset()
    allow_qos: frozenset[str] | None = None
    deny_qos: frozenset[str] = frozenset()
    root_only: bool = False
    needs_reservation: bool = False

    @property
    def asks_accounting(self) -> bool:
        """Whether the user's accounts or qualities of service decide."""
        lists = (self.allow_accounts, self.allow_qos)
        return bool(self.deny_accounts or self.deny_qos) or lists != (None, None)


@dataclass(frozen=True)
class Submitter:
    """The user whose jobs they are, as accounting knows him.

    Parameters
    ----------
    groups
        Names of his groups.
    qos_of
        Account -> default quality of service, of all accounts that he may use; empty
        where accounting does not tell.
    default_account
        Of jobs that name none; None if it is not known.
    parents
        Account -> the account above it.
    """

    user: str
    groups: frozenset[str] = frozenset()
    is_root: bool = False
    qos_of: Mapping[str, str] = field(default_factory=dict)
    default_account: str | None = None
    parents: Mapping[str, str] = field(default_factory=dict)

    def account(self, request: SlurmRequest) -> str | None:
        """Return the account of a job; None if it is not known.

        SLURM takes the default for one that the user has not, or refuses the job.
        """
        if request.account in self.qos_of:
            return request.account
        return self.default_account

    def qos(self, request: SlurmRequest) -> str | None:
        """Return the quality of service of a job; None if it is not known."""
        if request.qos is not None:
            return request.qos
        account = self.account(request)
        return self.qos_of.get(account or "") or None


def parse_access(fields: Mapping[str, str]) -> Access:
    """Return the access to a partition from what ``scontrol`` shows of it."""

    def names(key: str) -> frozenset[str] | None:
        text = fields.get(key, "ALL")
        return None if text.upper() in {"ALL", "(NULL)"} else frozenset(text.split(","))

    return Access(
        allow_groups=names("AllowGroups"),
        allow_accounts=names("AllowAccounts"),
        deny_accounts=names("DenyAccounts") or frozenset(),
        allow_qos=names("AllowQos"),
        deny_qos=names("DenyQos") or frozenset(),
        root_only=fields.get("RootOnly") == "YES",
        needs_reservation=fields.get("ReqResv") == "YES",
    )


def read_submitter(cluster: str, *, accounting: bool) -> Submitter:
    """Return who this process is; with accounting three short commands.

    Parameters
    ----------
    cluster
        Its name in accounting.
    accounting
        Whether there is any, and it is needed.
    """
    user = getpass.getuser()
    groups = _groups(user)
    is_root = os.geteuid() == 0
    if not accounting:
        return Submitter(user, groups, is_root)
    show = ["sacctmgr", "--noheader", "--parsable2", "show"]
    of_cluster = f"cluster={cluster}"
    try:
        return parse_submitter(
            Submitter(user, groups, is_root),
            run_slurm(
                [
                    *show, "associations", of_cluster, f"user={user}",
                    "format=Account,DefaultQOS,QOS",
                ]
            ),
            run_slurm([*show, "user", user, "format=DefaultAccount"]),
            run_slurm(
                [
                    *show, "associations", of_cluster, "user=",
                    "format=Account,ParentName",
                ]
            ),
        )  # fmt: skip
    except (LaunchError, MissingDependencyError):  # it may not be asked from everywhere
        return Submitter(user, groups, is_root)


def parse_submitter(
    who: Submitter, associations: str, default: str, accounts: str
) -> Submitter:
    """Return the user with what the three commands of accounting tell of him."""
    qos_of = {}
    for account, quality, qualities in _rows(associations, 3):
        only = qualities if "," not in qualities else ""
        qos_of[account] = quality or only
    return Submitter(
        who.user,
        who.groups,
        who.is_root,
        qos_of,
        default.strip().partition("\n")[0] or None,
        {row[0]: row[1] for row in _rows(accounts, 2)},
    )


def _rows(text: str, words: int) -> Iterator[tuple[str, ...]]:
    for line in text.splitlines():
        row = tuple(line.split("|"))
        if len(row) == words and row[0]:
            yield row


def _groups(user: str) -> frozenset[str]:
    found = set()
    for number in os.getgrouplist(user, os.getgid()):
        try:
            found.add(grp.getgrgid(number).gr_name)
        except KeyError:  # a number without a name
            found.add(str(number))
    return frozenset(found)


def access_problems(
    request: SlurmRequest, access: Access, who: Submitter | None, where: str
) -> list[str]:
    """Return why a user's request may not use a partition, with the way out.

    Parameters
    ----------
    who
        None if it is not known: then only what concerns everybody counts.
    where
        The partition, in words.
    """
    problems = []
    if access.needs_reservation and request.reservation is None:
        problems.append(f"{where} takes only jobs with a reservation (ReqResv)")
    if who is None:
        return problems
    if access.root_only and not who.is_root:
        problems.append(f"{where} takes jobs of root only (RootOnly)")
    allowed = access.allow_groups
    if allowed is not None and not who.is_root and not allowed & who.groups:
        problems.append(
            f"{where} takes only the groups {_list(allowed)} (AllowGroups), and "
            f"{who.user} is in {_list(who.groups)}"
        )
    return [
        *problems,
        *_account_problems(request, access, who, where),
        *_qos_problems(request, access, who, where),
    ]


def _account_problems(
    request: SlurmRequest, access: Access, who: Submitter, where: str
) -> list[str]:
    account = who.account(request)
    if account is None:
        return []
    mine = f"the job's would be {account!r}"
    if request.account not in {None, account}:
        mine += f", as {who.user} has no {request.account!r}"
    usable = who.qos_of.keys()
    if access.allow_accounts is not None:
        # Newer SLURM lets those below an allowed account in, too.
        if access.allow_accounts & {account, *_above(account, who.parents)}:
            return []
        good = sorted(usable & access.allow_accounts)
        return [
            f"{where} takes only the accounts {_list(access.allow_accounts)} "
            f"(AllowAccounts), {mine}" + (f"; set account: {good[0]}" if good else "")
        ]
    if account in access.deny_accounts:
        good = sorted(usable - access.deny_accounts)
        return [
            f"{where} takes no jobs of the account {account!r} (DenyAccounts)"
            + (f"; set account: {good[0]}" if good else "")
        ]
    return []


def _qos_problems(
    request: SlurmRequest, access: Access, who: Submitter, where: str
) -> list[str]:
    quality = who.qos(request)
    if quality is None:
        return []
    if access.allow_qos is not None and quality not in access.allow_qos:
        return [
            f"{where} takes only the QOS {_list(access.allow_qos)} (AllowQos), the "
            f"job's would be {quality!r}; set qos"
        ]
    if access.allow_qos is None and quality in access.deny_qos:
        return [f"{where} takes no jobs of the QOS {quality!r} (DenyQos); set qos"]
    return []


def _above(account: str, parents: Mapping[str, str]) -> set[str]:
    found: set[str] = set()
    while (account := parents.get(account, "")) and account not in found:
        found.add(account)
    return found


def _list(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))
