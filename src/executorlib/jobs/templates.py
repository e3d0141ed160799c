"""Job scripts: chooses the template of a submission and fills it in. pysqa renders all templates but the default one.

pysqa is loaded only when it is needed, because that takes half a second. The default template needs only Jinja.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from executorlib.jobs.registry import DEFAULT, DIALECTS, dialect_of
from executorlib.resources import OF_JOBS, listed, nearest_key

if TYPE_CHECKING:
    from executorlib.jobs.queue import Submission
    from executorlib.resources import Resources

logger = logging.getLogger("executorlib")

# Every template gets these; a key of the same name in resource_dict has no effect.
_OURS = ("command", "working_directory", "dependency_list")
# pysqa's own arguments, which programs pass whatever the template is.
_OF_PYSQA = ("queue", "job_name", "cores", "memory_max", "run_time_max", *_OURS)
# The resources that only the template can honour. Ranks, threads and time are also handled elsewhere.
_NEEDS_TEMPLATE = ("gpus_per_core", "num_nodes", "exclusive", "priority")
_INSTALL = 'Install it with `pip install "executorlib[cluster]"`.'
# The names of types of queues in configurations. Other types of pysqa are not supported: it can read neither job
# numbers nor states of MOAB, logs in elsewhere for REMOTE, and needs a shell for GENT.
_BY_COMMANDS = tuple(DIALECTS)
FLUX = ("FLUX",)


class Templates:
    """Chooses and renders templates: the call's own, otherwise one of a pysqa configuration, otherwise the default.

    Args:
        default: The template for calls without their own; None if there is none. With a configuration, the default of
            its type of queue replaces it.
        directory: A pysqa configuration: a directory with a ``queue.yaml`` and the templates that it names.
        types: The types of queues that the configuration may be for.

    Raises:
        ValueError: The directory holds no usable configuration.
        ImportError: The directory is given and pysqa is not installed.
    """

    def __init__(self, default: str | None, directory: str | None = None, types: Sequence[str] = _BY_COMMANDS) -> None:
        self._default = default
        self._directory = None if directory is None else os.path.abspath(os.path.expanduser(directory))
        self._adapter: Any = None
        self.queue_type = types[0]
        if self._directory is not None:
            self._adapter, self.queue_type = _read_configuration(self._directory, types)
            self._default = dialect_of(self.queue_type).default_template if self.queue_type in DIALECTS else None

    def is_default(self, submission: Submission) -> bool:
        """Return whether a submission gets the default template."""
        return self._template(submission)[0] is self._default

    def render(self, submission: Submission, **more: Any) -> str:
        """Render the job script of a submission.

        Args:
            submission: The submission.
            more: Further values for the template, besides the resources and the submission's own values.

        Raises:
            ValueError: Template and values do not fit; the text says which and why.
            ImportError: pysqa is not installed.
        """
        text, where = self._template(submission)
        values = {**self._values(submission, text), **more}
        from jinja2 import Template, TemplateError

        if text is self._default or not _is_known_to_pysqa(self.queue_type):
            render = Template(text).render
        else:
            commands = load_commands(self.queue_type)
            render = functools.partial(commands.render_submission_template, submission_template=text)
        try:
            script = render(**values)
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            line = getattr(error, "lineno", None)
            raise ValueError(f"{where} cannot be rendered: {f'line {line}: ' if line else ''}{error}") from error
        return str(script).rstrip("\n") + "\n"

    def unused(self, submission: Submission) -> list[str]:
        """The keys of ``resource_dict`` that are set but not used by the template."""
        text, where = self._template(submission)
        used = _variables(text, where)
        if self._directory is not None:
            used |= {"queue"}
        given = [key for key, value in submission.template_values.items() if value is not None]
        given += [key for key in _NEEDS_TEMPLATE if getattr(submission.resources, key)]
        return [key for key in given if key not in used or key in _OURS]

    def keys(self) -> set[str]:
        """The keys of ``resource_dict`` that the templates here can use, for all queues of a configuration.

        Raises:
            ValueError: A template is not valid.
            OSError: A template cannot be read.
            ImportError: Jinja is not installed.
        """
        if self._adapter is None:
            return _variables(self._default, "the default submission template") if self._default else set()
        assert self._directory is not None
        scripts = {queue.get("script") for queue in self._adapter.config["queues"].values()}
        paths = [os.path.join(self._directory, script) for script in scripts if script is not None]
        found = {name for path in paths for name in _variables(_read(path), path)}
        if None in scripts and self._default is not None:
            found |= _variables(self._default, "the default submission template")
        return found

    def _template(self, submission: Submission) -> tuple[str, str]:
        """A submission's template, and its name for error texts."""
        if submission.resources.submission_template is not None:
            return submission.resources.submission_template, "submission_template"
        script = None if self._adapter is None else self._queue(submission).get("script")
        if script is not None:
            assert self._directory is not None
            path = os.path.join(self._directory, script)
            return _read(path), f"submission template {path}"
        if self._default is None:
            raise ValueError("there is no template for this queue: give one as resource_dict['submission_template'].")
        return self._default, "the default submission template"

    def _queue(self, submission: Submission) -> dict[str, Any]:
        """The configuration's queue for a submission."""
        queues: dict[str, dict[str, Any]] = self._adapter.config["queues"]
        name = submission.template_values.get("queue") or self._adapter.config.get("queue_primary")
        queue = queues.get(name)
        if queue is None:
            raise ValueError(
                f"resource_dict['queue'] is {name!r}, but {self._directory}/queue.yaml has only {', '.join(queues)}."
            )
        if queue.get("script") is None and self._default is None:
            raise ValueError(
                f"queue {name!r} in {self._directory}/queue.yaml names no script, the submission template."
            )
        return queue

    def _values(self, submission: Submission, text: str) -> dict[str, Any]:
        resources = submission.resources
        cores = resources.cores
        if "threads_per_core" not in _variables(text, "submission_template"):
            # A template that knows only cores still has to request enough for the threads of all ranks.
            cores *= resources.threads_per_core
        values = {
            "job_name": submission.name,
            "partition": None,
            "memory_max": None,
            **{key: value for key, value in submission.template_values.items() if value is not None},
            "cores": cores,
            "threads_per_core": resources.threads_per_core,
            "gpus_per_core": resources.gpus_per_core,
            "num_nodes": resources.num_nodes,
            "exclusive": resources.exclusive,
            "priority": resources.priority,
            "run_time_max": None if resources.run_time_max is None else 60 * minutes(resources.run_time_max),
            "command": submission.command,
            "working_directory": submission.cwd,
            "dependency_list": None,
        }
        if self._adapter is not None and resources.submission_template is None:
            self._limit(submission, values)
        return values

    def _limit(self, submission: Submission, values: dict[str, Any]) -> None:
        """Apply the configuration's limits to the values, and fill in its defaults."""
        adapter, queue = self._adapter, self._queue(submission)
        cores, run_time_max, memory_max = adapter.check_queue_parameters(
            queue=None,
            cores=values["cores"],
            run_time_max=values["run_time_max"],
            memory_max=values["memory_max"],
            active_queue=queue,
        )
        if cores < values["cores"]:
            raise ValueError(
                f"the call needs {values['cores']} cores, but its queue has cores_max: {cores} in "
                f"{self._directory}/queue.yaml; choose another one with resource_dict['queue']."
            )
        values.update(cores=cores, run_time_max=run_time_max, memory_max=memory_max)
        values["queue"] = values.get("queue") or adapter.config.get("queue_primary")


def check_keys(resources: Resources, subject: str, templates: Templates | None) -> None:
    """Make sure that each key that is not executorlib's means something to a job script.

    The key may be one of the default templates, of the call's own template, of any template of the configuration, or an
    argument of pysqa. If the template in use ignores it, the user is warned later (`warn_of_unused`).

    Args:
        resources: The resources of a call.
        subject: The owner of the resources, for the error text.
        templates: The templates for calls that bring none.

    Raises:
        ValueError: There is another key, which is probably misspelt.
    """
    strange = [key for key in resources.template_values if key not in OF_JOBS and key not in _OF_PYSQA]
    if not strange:
        return
    own = resources.submission_template
    try:
        used = set() if own is None else _variables(own, "submission_template")
        if templates is not None:
            used |= templates.keys()
    except (ValueError, OSError, ImportError):
        return  # the call fails for the same reason
    for key in strange:
        if key not in used:
            near = nearest_key(key, [*OF_JOBS, *used])
            meant = f"; did you mean {near!r}?" if near else "."
            raise ValueError(
                f"{subject}: unknown key {key!r} in resource_dict{meant} No submission template here uses it. A key of "
                "your own needs a template that uses it (submission_template, or pysqa_config_directory)."
            )


def warn_of_unused(keys: Iterable[str], warned: set[str]) -> None:
    """Warn the user, once, of keys that have no effect.

    Args:
        keys: The keys.
        warned: The keys that the user has been warned of before; new ones are added.
    """
    new = [key for key in keys if key not in warned]
    if new:
        warned.update(new)
        logger.warning(
            "the submission template does not use these keys of resource_dict: %s; leave them out, or use a template "
            "that uses them",
            listed(new),
        )


def minutes(seconds: float) -> int:
    """A time limit in whole minutes that leaves the job's worker time to end the call itself and to report that."""
    return math.ceil(seconds / 60) + 1


def load_commands(queue_type: str) -> Any:
    """Load pysqa's commands for a type of queue.

    Raises:
        ImportError: pysqa, or a package that it needs for this queue, is not installed.
    """
    try:
        from pysqa.base.core import get_queue_commands

        return get_queue_commands(queue_type)
    except ImportError as error:
        if error.name == "defusedxml":
            text = f"Grid Engine's answers need the package defusedxml. {_INSTALL}"
            raise ImportError(text, name=error.name) from error
        raise ImportError(
            f"job scripts need the package pysqa, which cannot be loaded ({error}). {_INSTALL}",
            name=error.name,
        ) from error


def _is_known_to_pysqa(queue_type: str) -> bool:
    """Return whether pysqa has its own way of rendering templates for a type of queue."""
    load_commands(DEFAULT)
    from pysqa.base.core import queue_type_dict

    return queue_type in queue_type_dict


def _read_configuration(directory: str, types: Sequence[str]) -> tuple[Any, str]:
    """Load a configuration into pysqa's adapter; returns the adapter and the type of its queues."""
    load_commands(DEFAULT)
    from jinja2 import TemplateError
    from pysqa.base.config import QueueAdapterWithConfig, read_config

    path = os.path.join(directory, "queue.yaml")
    try:
        config = read_config(file_name=path)
        if not isinstance(config, dict) or not {"queue_type", "queues"} <= config.keys():
            raise ValueError("it needs the keys queue_type and queues")
        if config["queue_type"] not in types:
            other = "FluxClusterExecutor" if config["queue_type"] in FLUX else "SlurmClusterExecutor"
            known = config["queue_type"] in (*FLUX, *_BY_COMMANDS)
            hint = f"; use {other}" if known else ""
            raise ValueError(
                f"queues of type {config['queue_type']!r} cannot be used here, only {', '.join(types)}{hint}"
            )
        queue_type = str(config["queue_type"])
        if not _is_known_to_pysqa(queue_type):
            # The adapter is only asked for the limits and templates of queues, which do not depend on the type.
            config = {**config, "queue_type": DEFAULT}
        return QueueAdapterWithConfig(config=config, directory=directory), queue_type
    except ImportError:
        raise
    except (OSError, TemplateError) as error:
        raise ValueError(f"pysqa_config_directory={directory!r} cannot be used: {error}") from error
    except Exception as error:  # raised by YAML or pydantic
        raise ValueError(f"pysqa_config_directory={directory!r}: {path} cannot be used: {error}") from error


@functools.lru_cache
def _variables(text: str, where: str) -> set[str]:
    """The names of the values that a template expects."""
    try:
        from jinja2 import Environment, TemplateSyntaxError, meta
    except ImportError as error:
        raise ImportError(f"job scripts need the package jinja2, which comes with pysqa. {_INSTALL}") from error
    try:
        return set(meta.find_undeclared_variables(Environment().parse(text)))
    except TemplateSyntaxError as error:
        raise ValueError(f"{where} is not a valid Jinja template: line {error.lineno}: {error.message}") from error


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()
