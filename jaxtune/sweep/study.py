"""The study of a sweep: an Optuna study that several workers claim trials from.

A trial between rungs is WAITING, one that a worker has is RUNNING, a whole training is COMPLETE and
what was stopped or diverged is PRUNED; held-out losses are its intermediate values, at positions.
What else a record holds stands in user attributes. Optuna lets nobody change a WAITING trial but
its state, so attributes are written first, while it is RUNNING: whoever is killed between two
writes leaves a RUNNING trial without a living owner, and that goes back.
"""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.config import Config
from jaxtune.errors import ConfigError
from jaxtune.sweep import attributes, halving, sampling, sessions
from jaxtune.sweep import identity as identities
from jaxtune.sweep import space as spaces
from jaxtune.sweep.attributes import State
from jaxtune.sweep.prior import First
from jaxtune.sweep.records import SEARCH, Job, Record, Result, Role, Status
from jaxtune.sweep.space import Space
from jaxtune.sweep.storage import PATIENCE, Store, exists, resolve

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


def open_study(
    config: Config,
    folder: Path,
    identity: Mapping[str, Any],
    rungs: tuple[int, ...],
    enter: tuple[int, ...],
    first: Sequence[First] = (),
    *,
    space: Space,
    patience: float = PATIENCE,
    lease: float = 120.0,
    began: float | None = None,
) -> "Study":
    """The study named as the folder in `config.sweep.storage`; made where there is none.

    Args:
      identity: JSON values that tell whether a study is of the same model and data; "model" is the
        model's fingerprint.
      rungs: positions at which trials are compared.
      enter: how many trials may enter each rung, until `Study.allow` says otherwise.
      first: trials before the sampler is asked. A grid needs none. A study that is there keeps its
        own of these two.
      patience: seconds to wait for others' locks.
      lease: seconds without a sign of life after which a worker on another machine is dead.
      began: seconds since the epoch when this worker's command began; now, if it is None.
    Raises:
      StorageError: a storage that cannot be reached, is locked or damaged.
      ConfigError: a study of another model, data, space or settings; a sampler that is not there.
    """
    import optuna

    sampler = sampling.of(config.sweep.sampler, space, config)
    store = Store(resolve(config.sweep.storage, folder), patience)
    now = identities.whole(identity, config, space, rungs)
    with store.turn():
        made = {"storage": store.storage, "study_name": folder.name or "sweep"}
        study = optuna.create_study(**made, load_if_exists=True)
        session = sessions.Session(study, lease, began)
        begun = "identity" in study.user_attrs
        # What was refused before its first trial, a budget too short say, binds nobody.
        if begun and not store.storage.get_n_trials(study._study_id) and not session.count():
            optuna.delete_study(**made)
            study = optuna.create_study(**made)
            session = sessions.Session(study, lease, began)
        saved = study.user_attrs
        if "identity" in saved:
            identities.check_same(saved["identity"], now, store.name)
        else:  # new, or whoever made it was killed before it got further
            given = () if config.sweep.sampler == "grid" else first
            study.set_user_attr("first", [attributes.plain(one) for one in given])
            study.set_user_attr("enter", list(enter))
            study.set_user_attr("started", time.time())
            study.set_user_attr("identity", now)
        session.renew()
    return Study(store, study, space, sampler, session)


def reach(text: str, folder: Path, patience: float = PATIENCE) -> None:
    """Raises StorageError or ConfigError where `sweep.storage` cannot be had."""
    with Store(resolve(text, folder), patience).turn():
        pass


def winners(
    config: Config, folder: Path, model: str, *, patience: float = PATIENCE
) -> tuple[dict[str, Any], ...]:
    """Params of the winners of other studies of the same model, the latest last.

    They are looked for in the sweep's own storage and in those of `sweep.prior`.

    Args:
      model: "model" of the identity the studies were opened with.
    Raises:
      ConfigError: a storage of sweep.prior that is not there. StorageError: one that is damaged.
    """
    own = resolve(config.sweep.storage, folder)
    earlier = {resolve(text, Path()): text for text in config.sweep.prior}
    found = []
    for url, text in {own: "", **earlier}.items():
        if not exists(url):
            if text:
                raise ConfigError(
                    f"sweep.prior {text!r} does not exist", fix="the storage of an earlier sweep"
                )
            continue
        store = Store(url, patience)
        with store.guarded():
            for study in store.storage.get_all_studies():
                attrs = study.user_attrs
                if url == own and study.study_name == (folder.name or "sweep"):
                    continue
                if attrs.get("identity", {}).get("model") != model:
                    continue
                trials = store.storage.get_all_trials(study._study_id, deepcopy=False)
                best = halving.best([attributes.record(t) for t in trials if attributes.ours(t)])
                if best is not None and best.status == "finished":
                    found.append((attrs["started"], best.params))
    return tuple(params for _, params in sorted(found, key=lambda pair: pair[0]))


class Study:
    """The study as one worker has it; made by `open_study`. Every call may raise StorageError."""

    def __init__(
        self,
        store: Store,
        study: "optuna.Study",
        space: Space,
        sampler: sampling.Sampler,
        session: sessions.Session,
    ):
        self._store, self._study, self._sampler, self._space = store, study, sampler, space
        # Optuna's storages are for developers to use, but a study has no public name for its own.
        self._storage, self._id = store.storage, study._study_id
        self._session = session
        with store.guarded():
            attrs = study.user_attrs
        self.name: str = study.study_name
        self.started: float = attrs["started"]  # seconds since the epoch
        self.rungs: tuple[int, ...] = tuple(attrs["identity"]["rungs"])  # positions
        self._first = [First(attributes.tuples(p), role, why) for p, role, why in attrs["first"]]
        self.enter = self._limited(attrs["enter"])  # how many trials may enter each rung

    # What there is

    def records(self) -> tuple[Record, ...]:
        """All trials, by number."""
        with self._store.guarded():
            return tuple(attributes.record(trial) for trial in self._trials())

    def notes(self) -> tuple[str, ...]:
        """What the sweep decided, in order."""
        with self._store.guarded():
            return tuple(self._study.user_attrs.get("notes", ()))

    def note(self, text: str) -> None:
        """Keeps a line, once."""
        with self._store.turn():
            notes = self._study.user_attrs.get("notes", [])
            if text not in notes:
                self._study.set_user_attr("notes", [*notes, text])

    def allow(self, enter: Sequence[int]) -> None:
        """Sets how many trials may enter each rung, for all workers."""
        with self._store.turn():
            self._study.set_user_attr("enter", list(enter))
            self.enter = self._limited(enter)

    def seconds(self) -> float:
        """Seconds in which some worker was at work, over all sessions; two at once count once."""
        with self._store.guarded():
            return self._session.union()

    # Who is alive

    def renew(self) -> None:
        """A sign of life; from any thread, and several times in a lease."""
        with self._store.guarded():
            self._session.renew()

    def workers(self) -> int:
        """How many workers are at work, this one included."""
        with self._store.guarded():
            return self._session.count()

    def requeue(self) -> list[int]:
        """Numbers of trials whose workers are dead; they wait again. `claim` does it too."""
        with self._store.turn():
            return self._requeue(self._trials())

    # What is to do

    def claim(self, roles: Collection[Role]) -> Job | None:
        """The next rung to do, from now on this worker's; None where there is none at present.

        First what was begun or was asked for with `add`, then new trials, then the best of a rung.
        With the same records it is always the same.
        """
        with self._store.turn():
            enter = self.enter = self._limited(self._study.user_attrs["enter"])
            trials = self._trials()
            if self._requeue(trials):
                trials = self._trials()
            records = [attributes.record(trial) for trial in trials]
            by_number = {trial.number: trial for trial in trials}
            for record, why in halving.beaten(records, enter):
                self._stop(by_number[record.number], why)
            for record in records:
                if record.status == "waiting" and record.role in roles:
                    return self._take(by_number[record.number], record, record.rung)
            if not set(roles) & set(SEARCH):
                return None
            if sum(r.role in SEARCH for r in records) < enter[0]:
                return self._new(records)
            going_on = halving.promotable(records, enter, self._session.owner)
            return self._take(by_number[going_on[0].number], *going_on) if going_on else None

    def done(self, roles: Collection[Role]) -> bool:
        """Whether nothing is left to do or being done in these roles, by any worker."""
        with self._store.guarded():
            enter = self._limited(self._study.user_attrs["enter"])
        records = self.records()
        if any(r.status in ("waiting", "running") and r.role in roles for r in records):
            return False
        if not set(roles) & set(SEARCH):
            return True
        fewer = sum(r.role in SEARCH for r in records) < enter[0]
        return not fewer and halving.promotable(records, enter) is None

    def add(
        self,
        role: Role,
        params: Mapping[str, Any],
        *,
        repeats: str = "",
        seed: int | None = None,
        of: int | None = None,
    ) -> None:
        """A trial for whoever claims its role; the same once more is the one that is there."""
        about = {"role": role, "why": "", "repeats": repeats, "seed": seed, "of": of}
        about["params"] = attributes.plain(params)
        with self._store.turn():
            if all(trial.user_attrs["about"] != about for trial in self._trials()):
                self._create("WAITING", params, about, State(len(self.rungs) - 1, ""))

    # What was done

    def record(self, number: int, result: Result, curve: halving.Curve, *, finished: bool) -> bool:
        """A rung is done and the trial's state is on disk; whether it was this worker's to say.

        A rung counts once. A loss that is not finite ends the trial as diverged.

        Args:
          curve: (position, training loss) from the beginning.
          finished: the whole training is done, not only the rung.
        """
        with self._store.turn():
            trial = self._trial(number)
            if not self._mine(trial):
                return False
            self._set(trial, "curve", attributes.rounded(curve))
            self._storage.set_trial_intermediate_value(
                trial._trial_id, result.position, attributes.finite(result.loss)
            )
            state = attributes.state(trial)
            row = (*result, finished)
            self._settle(trial, state._replace(results=(*state.results, row)))
            return True

    def stop(
        self,
        number: int,
        status: Status,
        why: str,
        curve: halving.Curve = (),
        tokens: int = 0,
        seconds: float = 0.0,
    ) -> bool:
        """Ends a trial in the middle of a rung; whether it was this worker's to end.

        Args:
          status: "stopped" or "diverged".
          tokens, seconds: spent on the rung that it leaves.
        """
        with self._store.turn():
            trial = self._trial(number)
            if not self._mine(trial):
                return False
            if curve:
                self._set(trial, "curve", attributes.rounded(curve))
                if not trial.intermediate_values:  # so that it is somewhere in Optuna's pictures
                    at, loss = curve[-1]
                    self._storage.set_trial_intermediate_value(
                        trial._trial_id, at, attributes.finite(loss)
                    )
            ended = (status, why, tokens, seconds)
            self._settle(trial, attributes.state(trial)._replace(ended=ended))
            return True

    def release(self, number: int, curve: halving.Curve = ()) -> None:
        """Gives a trial back as it is, for any worker to go on with."""
        with self._store.turn():
            trial = self._trial(number)
            if self._mine(trial):
                if curve:
                    self._set(trial, "curve", attributes.rounded(curve))
                self._settle(trial, attributes.state(trial))

    # Within a turn

    def _trials(self) -> "list[FrozenTrial]":
        found = self._storage.get_all_trials(self._id, deepcopy=False)
        return [trial for trial in found if attributes.ours(trial)]

    def _trial(self, number: int) -> "FrozenTrial":
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
        return self._storage.get_trial(trial_id)

    def _mine(self, trial: "FrozenTrial") -> bool:
        running = trial.state.name == "RUNNING"
        return running and attributes.state(trial).owner == self._session.key

    def _set(self, trial: "FrozenTrial", key: str, value: Any) -> None:
        self._storage.set_trial_user_attr(trial._trial_id, key, attributes.plain(value))

    def _limited(self, enter: Sequence[int]) -> tuple[int, ...]:
        """Quotas, with no more trials than there are different ones."""
        most = self._sampler.limit(self._first)
        return tuple(int(min(count, most)) for count in enter)

    def _requeue(self, trials: "Sequence[FrozenTrial]") -> list[int]:
        running = [trial for trial in trials if trial.state.name == "RUNNING"]
        alive = self._session.alive({attributes.state(trial).owner for trial in running})
        dead = [trial for trial in running if attributes.state(trial).owner not in alive]
        for trial in dead:
            self._settle(trial, attributes.state(trial))
        return [trial.number for trial in dead]

    def _settle(self, trial: "FrozenTrial", state: State) -> None:
        """RUNNING to what the state says: ended where it was ended, WAITING otherwise."""
        from optuna.trial import TrialState

        row = state.last()
        if row is not None and not state.ended and not math.isfinite(row[2]):
            state = state._replace(ended=("diverged", f"held-out loss is {row[2]}", 0, 0.0))
        self._set(trial, "state", state._replace(owner=""))
        if state.ended:
            self._study.tell(trial.number, state=TrialState.PRUNED)
        elif row is not None and row[-1]:
            self._study.tell(trial.number, row[2])
        else:
            self._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def _stop(self, trial: "FrozenTrial", why: str) -> None:
        """Ends a trial that waits."""
        if self._run(trial):
            self._settle(trial, attributes.state(trial)._replace(ended=("stopped", why, 0, 0.0)))

    def _run(self, trial: "FrozenTrial") -> bool:
        """WAITING to RUNNING; False where one has it that does not know our turns."""
        from optuna.trial import TrialState

        return self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)

    def _take(self, trial: "FrozenTrial", record: Record, rung: int) -> Job | None:
        if not self._run(trial):
            return None
        state = attributes.state(trial)
        self._set(trial, "state", state._replace(rung=rung, owner=self._session.key))
        start = max((result.position for result in record.results), default=0)
        seed = trial.user_attrs["about"]["seed"]
        return Job(
            record.number, record.params, record.role, rung, start, record.repeats, seed, record.of
        )

    def _new(self, records: Sequence[Record]) -> Job:
        trials = [r for r in records if r.role in SEARCH]
        system = {}
        if len(trials) < len(self._first):
            chosen = self._first[len(trials)]
        else:
            chosen, system = self._sampler.ask(trials)
        about = {"role": chosen.role, "why": chosen.why, "repeats": "", "seed": None, "of": None}
        about["params"] = attributes.plain(chosen.params)
        state = State(0, self._session.key)
        number = self._create("RUNNING", chosen.params, about, state, system)
        return Job(number, dict(chosen.params), chosen.role, 0, 0)

    def _create(
        self,
        state: str,
        params: Mapping[str, Any],
        about: Mapping[str, Any],
        begun: State,
        system: Mapping[str, Any] | None = None,
    ) -> int:
        from optuna.trial import TrialState, create_trial

        # Optuna knows what lies within the space; the attribute has all.
        inside = {k: v for k, v in params.items() if k in self._space}
        inside = {k: v for k, v in inside.items() if spaces.contains(self._space[k], v)}
        known = spaces.distributions(self._space)
        template = create_trial(
            state=TrialState[state],
            params={k: spaces.encoded(v) for k, v in inside.items()},
            distributions={k: known[k] for k in inside},
            user_attrs={"about": about, "state": attributes.plain(begun)},
            system_attrs=dict(system or {}),
        )
        trial_id = self._storage.create_new_trial(self._id, template_trial=template)
        return self._storage.get_trial_number_from_id(trial_id)
