"""Method callbacks: functions that run before and after the methods of trainers and factories.

A class names them in `callbacks = [("post-step", fn)]` or as a method `pre_step_callback`. Those of
parents run first, then the list of a class, then its method. A pre callback receives as many of the
method's arguments as it takes, and may return them changed in the same order; a post callback
receives what the method returned, and may return something else.
"""

import inspect
from abc import ABCMeta
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from jaxtrain.recipe.errors import did_you_mean

Hook = Callable[..., Any]
Instance = TypeVar("Instance")


class HookedMethod:
    """Calls a method between its callbacks; all other attributes are the method's own."""

    def __init__(self, owner: Any, method: Any, pre: list[Hook], post: list[Hook]):
        self.owner, self.method, self.pre, self.post = owner, method, pre, post

    def __call__(self, *args: Any, **named: Any) -> Any:
        bound = inspect.signature(self.method).bind(*args, **named)
        bound.apply_defaults()
        for hook in self.pre:
            names = list(bound.arguments)[: count_values(hook)]
            changed = hook(self.owner, *(bound.arguments[name] for name in names))
            if changed is None:
                continue
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
            changed = hook(self.owner) if result is None else hook(self.owner, result)
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
        for event, hook in find_own_hooks(cls):
            when, _, what = event.partition("-")
            if when not in ("pre", "post") or what not in known:
                near = did_you_mean(event, [f"{w}-{e}" for w in ("pre", "post") for e in known])
                raise ValueError(
                    f"{cls.__qualname__}: no event {event!r}{near} "
                    f"(events: {', '.join(sorted(known))})"
                )
            received = ["result"]
            if when == "pre":
                received = list(inspect.signature(getattr(cls, known[what])).parameters)[1:]
            if (count_values(hook) or 0) > len(received):
                raise ValueError(
                    f"{cls.__qualname__}: the {event} callback takes {count_values(hook)} values "
                    f"beside self; it is called as ({', '.join(['self', *received])})"
                )

    def find_hooks(self, event: str) -> list[Hook]:
        """Returns the callbacks of an event in the order in which they run."""
        mro = reversed(type(self).__mro__)
        return [hook for cls in mro for name, hook in find_own_hooks(cls) if name == event]


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


def count_values(hook: Hook) -> int | None:
    """Counts the values that a callback takes beside `self`; None takes all there are."""
    kinds = [p.kind for p in inspect.signature(hook).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    return kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) - 1
