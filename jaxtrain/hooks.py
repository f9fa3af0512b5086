"""Method callbacks: functions that run before and after the methods of trainers and factories.

A class names them in `callbacks = [("post-step", fn)]` or as a method `pre_step_callback`. Those of
parents run first, then the list of a class, then its method; a parent's that a class lists again
runs once. A pre callback receives the arguments of the method that it names, and may return them
changed in its own order; a post callback receives what the method returned, and may return
something else.
"""

import inspect
from abc import ABCMeta
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from jaxtrain.recipe.errors import did_you_mean

Hook = Callable[..., Any]
BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
Instance = TypeVar("Instance")


class HookedMethod:
    """Calls a method between its callbacks; all other attributes are the method's own."""

    def __init__(self, owner: Any, method: Any, pre: list[Hook], post: list[Hook]):
        self.owner, self.method, self.pre, self.post = owner, method, pre, post

    def __call__(self, *args: Any, **named: Any) -> Any:
        bound = inspect.signature(self.method).bind(*args, **named)
        bound.apply_defaults()
        for hook in self.pre:
            values, named_values = choose_arguments(hook, bound.arguments)
            changed = hook(self.owner, *values.values(), **named_values)
            if changed is None:
                continue
            names = [*values, *named_values]
            values = changed if len(names) > 1 else (changed,)
            if not isinstance(values, tuple) or len(values) != len(names):
                raise ValueError(
                    f"{type(self.owner).__qualname__}: a callback before "
                    f"{self.method.__name__} must return ({', '.join(names)}) or nothing, "
                    f"found {type(changed).__name__}"
                )
            bound.arguments.update(zip(names, values, strict=True))
        result = self.method(*bound.args, **bound.kwargs)
        for hook in self.post:
            given = {} if result is None else {name_result(hook): result}
            values, named_values = choose_arguments(hook, given)
            changed = hook(self.owner, *values.values(), **named_values)
            result = result if changed is None else changed
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)


class _HookMeta(ABCMeta):
    """Creates an object between its `init` callbacks, and wraps its methods in the others."""

    def __call__(cls: type[Instance], *args: Any, **named: Any) -> Instance:
        instance: Any = cls.__new__(cls)
        around_init = HookedMethod(instance, instance.__init__, instance.find_hooks("pre-init"), [])
        around_init(*args, **named)
        for event, name in instance.events.items():
            pre, post = instance.find_hooks(f"pre-{event}"), instance.find_hooks(f"post-{event}")
            if pre or post:
                setattr(instance, name, HookedMethod(instance, getattr(instance, name), pre, post))
        for hook in instance.find_hooks("post-init"):
            hook(instance)
        return instance


class HasHooks(metaclass=_HookMeta):
    """A base class whose subclasses may name callbacks."""

    events: ClassVar[dict[str, str]] = {}
    """Event → its method; every class has the event `init`."""
    callbacks: ClassVar[list[tuple[str, Hook]]] = []

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        known = {"init": "__init__", **cls.events}
        for event, _ in find_own_hooks(cls):
            when, _, what = event.partition("-")
            if when not in ("pre", "post") or what not in known:
                near = did_you_mean(event, [f"{w}-{e}" for w in ("pre", "post") for e in known])
                raise ValueError(
                    f"{cls.__qualname__}: no event {event!r}{near} "
                    f"(events: {', '.join(sorted(known))})"
                )
        for event, name in known.items():
            for hook in cls.find_hooks(f"pre-{event}"):
                received = list(inspect.signature(getattr(cls, name)).parameters)[1:]
                check_parameters(hook, received, f"{cls.__qualname__}: the pre-{event} callback")
            for hook in cls.find_hooks(f"post-{event}"):
                received = [name_result(hook)]
                check_parameters(hook, received, f"{cls.__qualname__}: the post-{event} callback")

    @classmethod
    def find_hooks(cls, event: str) -> list[Hook]:
        """Returns the callbacks of an event in the order in which they run."""
        found: list[Hook] = []
        for base in reversed(cls.__mro__):
            own = [hook for name, hook in find_own_hooks(base) if name == event]
            found += [hook for hook in own if hook not in found]
        return found


def find_own_hooks(cls: type) -> list[tuple[str, Hook]]:
    """Returns the event, with hyphens, and the function of every callback in a class body."""
    listed = [(str(event), hook) for event, hook in vars(cls).get("callbacks", [])]
    methods = [
        (name.removesuffix("_callback"), function)
        for name, function in vars(cls).items()
        if name.startswith(("pre_", "post_")) and name.endswith("_callback")
        if inspect.isfunction(function)
    ]
    return [(event.replace("_", "-"), hook) for event, hook in listed + methods]


def check_parameters(hook: Hook, received: Sequence[str], what: str) -> None:
    """ValueError for a parameter of a callback that is none of the values which it receives."""
    for parameter in list_parameters(hook):
        is_by_name = (
            parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        )
        if (parameter.kind in BY_PLACE or is_by_name) and parameter.name not in received:
            raise ValueError(
                f"{what} takes {parameter.name!r}{did_you_mean(parameter.name, received)}; it "
                f"receives what it names of ({', '.join(['self', *received])})"
            )


def choose_arguments(hook: Hook, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the values that a callback takes besides `self`, by place and by name: those that it
    names, and all others where it has `*args` or `**kwargs`."""
    parameters = list_parameters(hook)
    kinds = {p.kind for p in parameters}
    known = {p.name: p.kind for p in parameters if p.name in given}
    places = {name: given[name] for name, kind in known.items() if kind in BY_PLACE}
    named = {name: given[name] for name in known if name not in places}
    rest = {name: value for name, value in given.items() if name not in known}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        places |= rest
    elif inspect.Parameter.VAR_KEYWORD in kinds:
        named |= rest
    return places, named


def name_result(hook: Hook) -> str:
    """Returns the name by which a post callback receives a result: that of its first parameter."""
    names = [p.name for p in list_parameters(hook) if p.kind in BY_PLACE]
    return names[0] if names else "result"


def list_parameters(hook: Hook) -> list[inspect.Parameter]:
    """Returns the parameters of a callback besides `self`."""
    parameters = list(inspect.signature(hook).parameters.values())
    return parameters[parameters[0].kind in BY_PLACE :] if parameters else []
