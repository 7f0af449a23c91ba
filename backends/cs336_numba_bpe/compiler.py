"""Compiling the kernels' numba source into object code for this CPU. Imported only where there is none on disk yet."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import llvmlite.binding as llvm
import numba

from .kernel_list import GROUPS, symbol_of

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()


def compile_group(group: str) -> bytes:
    """Compile the kernels of a group into one object file's bytes."""
    modules, symbols = [], {}
    for name, kernel in GROUPS[group].items():
        function = getattr(import_module(f".kernels.{kernel.module}", __package__), name.split(":")[0])
        signature = tuple(_numba_type(argument) for argument in kernel.arguments)
        function.compile(signature)
        compiled = function.overloads[signature]
        symbols[compiled.fndesc.llvm_func_name] = symbol_of(name)
        modules.append(llvm.parse_assembly(compiled.library.get_llvm_str()))
    merged = modules[0]
    for module in modules[1:]:
        merged.link_in(module)
    for symbol, name in symbols.items():
        merged.link_in(llvm.parse_assembly(_from_one_array(name, merged.get_function(symbol))))
    for function in merged.functions:
        if not function.is_declaration and function.name not in symbols.values():
            function.linkage = "internal"
    machine = _target_machine(reloc="pic", codemodel="default")
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(merged, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    _refuse_outside_symbols(merged, group)
    return machine.emit_object(merged)


def _from_one_array(name: str, function: Any) -> str:
    """Assembly of a function that takes the address of an array with all the arguments of `function` and calls it:
    passing 170 arguments takes Python longer than a kernel takes for 10 kB of text."""
    types = [str(argument.type) for argument in function.arguments]
    lines = [f"declare i32 @{function.name}({', '.join(types)})", f"define i32 @{name}(ptr %values) {{"]
    for place, type_ in enumerate(types):
        lines.append(f"%place{place} = getelementptr i64, ptr %values, i64 {place}")
        lines.append(f"%value{place} = load {type_}, ptr %place{place}")
    values = ", ".join(f"{type_} %value{place}" for place, type_ in enumerate(types))
    return "\n".join([*lines, f"%status = call i32 @{function.name}({values})", "ret i32 %status", "}"])


def link(code: bytes, names: list[str]) -> dict[str, int]:
    """The addresses of an object file's functions, linked by llvmlite; they stay for the life of the process."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine(jit=True))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return {name: engine.get_function_address(name) for name in names}


_engines: list[Any] = []


def _target_machine(**options: Any) -> Any:
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, **options
    )


def _refuse_outside_symbols(module: Any, group: str) -> None:
    """Object code that needs anything from numba's runtime would end the process when it is linked."""
    allowed = ("llvm.", "memcpy", "memset", "memmove")
    outside = [f.name for f in module.functions if f.is_declaration and not f.name.startswith(allowed)]
    if outside:
        raise RuntimeError(f"kernels of group {group} call {', '.join(outside)}, which only numba's runtime has")


def _numba_type(argument: str) -> Any:
    name, brackets = argument.partition("[")[0], argument.count("[")
    scalar = getattr(numba.types, name)
    return numba.types.Array(scalar, brackets, "C") if brackets else scalar
