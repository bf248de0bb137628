#!/usr/bin/env bash
# Transformer Engine on a borrowed GPU machine without network, where no file above 60 MB may be sent; then the FP8 parts
# of run.sh. Nothing of this has run on a GPU: its dry run and its refusals are tested.
#
# Here, with network, in the project's environment:
#   bash tests/gpu/te.sh fetch [DIR]      download core, torch extension (source), Python packages and build tools into
#                                         DIR (default build/te), and split what is above 60 MB
#   bash tests/gpu/te.sh split DIR        split the files of DIR that are above 60 MB; write DIR/SHA256SUMS
# There, once for every part that was sent (all of them may be sent at once where that is possible):
#   bash tests/gpu/te.sh store DIR        move the files of DIR into TAWIN_TE_STORE
# There, when all are in the store:
#   bash tests/gpu/te.sh build            join, check, compile the extension with nvcc; what is built stays in the store
#   bash tests/gpu/te.sh run [...]        the FP8 parts of run.sh; arguments are run.sh's, e.g. --json FILE
#   bash tests/gpu/te.sh                  build, then run
#
# Environment:
#   TAWIN_TE_STORE     where the files lie there (default ~/te_store, outside the checkout)
#   TAWIN_TE_PYTHON    Python of the machine that fetch downloads for (default 3.12)
#   TAWIN_TE_PART      bytes of a part (default 60000000)
#   TAWIN_PYTHON       interpreter (default python3): that of the torch which the extension is compiled against
#   TAWIN_CUDA_ARCHS   compute capabilities to compile for (default 90: H100, H200, H800)
#   MAX_JOBS           compilers at a time (default 8)
#   TAWIN_DRY_RUN=1    fetch, build and run print their commands; files are joined and checked all the same
# Exit code: 0; 1 when a part of run.sh failed; 2 when something is missing, which it names.
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
python=${TAWIN_PYTHON:-python3}
store=${TAWIN_TE_STORE:-$HOME/te_store}
target=${TAWIN_TE_PYTHON:-3.12}
version=2.11.0
parts=mismatch_bf16,mismatch_fp8-blockwise,mismatch_fp8-tensorwise,mismatch_fp8-delayed,train_bf16,train_fp8-blockwise
parts=$parts,train_fp8-tensorwise,train_fp8-delayed,pytest

fail() {
    echo "te.sh: $*" >&2
    exit 2
}
run() {
    if [ "${TAWIN_DRY_RUN:-}" = 1 ]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}
pip() { run "$python" -m pip --disable-pip-version-check "$@"; }

# setup.py of the source asks torch for its CUDA version, also when it is only downloaded: a CPU build is given one.
fetch() {
    local folder=$1 wheels stub
    mkdir -p "$folder"
    wheels=(transformer_engine_cu13=="$version" transformer_engine=="$version" 'setuptools>=70.1' wheel ninja pybind11)
    pip download --quiet --no-deps --only-binary :all: --python-version "$target" --dest "$folder" "${wheels[@]}"
    # what its Python imports besides torch, with what these need and torch has not brought along
    pip download --quiet --only-binary :all: --python-version "$target" --dest "$folder" \
        packaging pydantic einops onnxscript importlib-metadata
    run rm -f "$folder"/numpy-*.whl "$folder"/sympy-*.whl "$folder"/mpmath-*.whl
    stub=$(mktemp -d)
    printf 'import torch.version\n\ntorch.version.cuda = torch.version.cuda or "13.0"\n' >"$stub/sitecustomize.py"
    run env "PYTHONPATH=$stub" "$python" -m pip --disable-pip-version-check download --quiet --no-deps --no-binary :all: \
        --no-build-isolation --dest "$folder" transformer_engine_torch=="$version"
    rm -r "$stub"
    [ "${TAWIN_DRY_RUN:-}" = 1 ] || split_files "$folder"
}

# Files above a part's size become NAME.part-00, NAME.part-01, ...; SHA256SUMS has whole files, PARTS the parts of each.
split_files() {
    local folder=$1 bytes=${TAWIN_TE_PART:-60000000} file sums large
    [ -d "$folder" ] || fail "no folder $folder: bash tests/gpu/te.sh fetch makes one"
    cd "$folder"
    [ -z "$(find . -name '*.part-*' -print -quit)" ] || fail "$folder holds parts already: remove it and fetch again"
    [ -n "$(find . -maxdepth 1 -type f ! -name SHA256SUMS ! -name PARTS -print -quit)" ] || fail "$folder is empty"
    rm -f SHA256SUMS PARTS
    sums=$(find . -maxdepth 1 -type f -printf '%f\0' | sort -z | xargs -0 sha256sum)
    large=$(find . -maxdepth 1 -type f -size +"$bytes"c -printf '%f\n' | sort)
    echo "$sums" >SHA256SUMS
    : >PARTS
    for file in $large; do
        split --bytes "$bytes" --numeric-suffixes --suffix-length 2 "$file" "$file.part-"
        find . -maxdepth 1 -name "$file.part-*" -printf '%f\n' | sort >>PARTS
        rm "$file"
    done
    cd "$here"
    echo "$folder: $(wc -l <"$folder/SHA256SUMS") files, $(wc -l <"$folder/PARTS") parts of at most $bytes bytes"
}

keep() {
    local folder=$1
    [ -d "$folder" ] || fail "no folder $folder: it is what te.sh fetch wrote and what was sent of it"
    mkdir -p "$store"
    find "$folder" -maxdepth 1 -type f -exec mv -t "$store" {} +
    echo "$store: $(find "$store" -maxdepth 1 -type f | wc -l) files"
}

# Whole files out of their parts. Parts stay until the checksum of the whole is right.
join_parts() {
    local part missing="" file
    [ -f "$store/SHA256SUMS" ] && [ -f "$store/PARTS" ] || fail "no SHA256SUMS and PARTS in $store: bash tests/gpu/te.sh store DIR"
    cd "$store"
    while read -r file; do
        [ -f "$file" ] && continue
        while read -r part; do
            [ -f "$part" ] || missing="$missing $part"
        done < <(grep -F "$file.part-" PARTS || echo "$file")
    done < <(sed 's/^[0-9a-f]* [ *]//' SHA256SUMS)
    [ -z "$missing" ] || fail "not in $store yet:$missing"
    while read -r file; do
        [ -f "$file" ] && continue
        grep -F "$file.part-" PARTS | xargs cat >"$file.joining"
        mv "$file.joining" "$file"
    done < <(sed 's/^[0-9a-f]* [ *]//' SHA256SUMS)
    if ! sha256sum --check --strict --quiet SHA256SUMS >&2; then
        sed 's/\.part-[0-9]*$//' PARTS | sort -u | xargs rm -f # joined again when the right parts are there
        fail "a file of $store is not the one that was split (above): send it, or its parts, again"
    fi
    xargs rm -f <PARTS
    cd "$here"
}

# The machine can compile: nvcc of torch's CUDA version, which the core's wheel is for as well.
check_machine() {
    local cuda toolkit core nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
    toolkit=$("$nvcc" --version 2>/dev/null | sed -n 's/.*release \([0-9][0-9.]*\).*/\1/p') || true
    [ -n "$toolkit" ] || fail "no nvcc: set CUDA_HOME to a CUDA toolkit"
    cuda=$("$python" -c 'import torch; print(torch.version.cuda or "none")') || fail "$python cannot import torch"
    [ "$cuda" != none ] || fail "the torch of $python is a CPU build: set TAWIN_PYTHON to one with CUDA"
    [ "${toolkit%%.*}" = "${cuda%%.*}" ] || fail "nvcc is CUDA $toolkit, torch is for CUDA $cuda: set CUDA_HOME to a toolkit of CUDA ${cuda%%.*}"
    core=$(find "$store" -maxdepth 1 -name "transformer_engine_cu${cuda%%.*}-*.whl" | head -n 1)
    [ -n "$core" ] || fail "no transformer_engine_cu${cuda%%.*} in $store, and torch is for CUDA $cuda"
    source=$(find "$store" -maxdepth 1 -name 'transformer_engine_torch-*.tar.gz' | head -n 1)
    [ -n "$source" ] || fail "no source of transformer_engine_torch in $store: fetch it"
}

build() {
    local source headers tools
    join_parts
    check_machine
    cd "$here"
    tools=$(find "$store" -maxdepth 1 -name '*.whl' ! -name 'transformer_engine*' | sort)
    rm -rf "$store/tools" "$store/site"
    if [ -z "$(find "$store/built" -name 'transformer_engine_torch-*.whl' -print -quit 2>/dev/null)" ]; then
        # shellcheck disable=SC2086 # names of wheels have no spaces
        [ -z "$tools" ] || pip install --quiet --no-index --no-deps --target "$store/tools" $tools
        headers=$("$python" recipes/nvidia_headers.py)
        export CPATH=$headers${CPATH:+:$CPATH} NVTE_FRAMEWORK=pytorch
        export NVTE_CUDA_ARCHS=${TAWIN_CUDA_ARCHS:-90} MAX_JOBS=${MAX_JOBS:-8}
        [ "${TAWIN_DRY_RUN:-}" != 1 ] || echo "NVTE_CUDA_ARCHS=$NVTE_CUDA_ARCHS MAX_JOBS=$MAX_JOBS CPATH=$CPATH"
        run env "PYTHONPATH=$store/tools" "PATH=$store/tools/bin:$PATH" "$python" -m pip --disable-pip-version-check \
            wheel --no-index --no-deps --no-build-isolation --wheel-dir "$store/built" "$source"
    fi
    # one call: core and extension have files in one folder, which pip --target does not merge
    # shellcheck disable=SC2046
    pip install --quiet --no-index --no-deps --target "$store/site" \
        $(find "$store" -maxdepth 2 -name '*.whl' ! -path "$store/tools/*" | sort)
    run env "PYTHONPATH=$store/site" "$python" -c \
        'import transformer_engine, transformer_engine.pytorch; print("Transformer Engine", transformer_engine.__version__)'
}

run_parts() {
    [ "${TAWIN_DRY_RUN:-}" = 1 ] || [ -d "$store/site/transformer_engine" ] || fail "Transformer Engine is not built in $store: bash tests/gpu/te.sh build"
    run env "PYTHONPATH=$store/site${PYTHONPATH:+:$PYTHONPATH}" "TAWIN_PYTHON=$python" \
        bash "$here/tests/gpu/run.sh" --parts "$parts" "$@"
}

verb=${1:-all}
[ $# -eq 0 ] || shift
case $verb in
fetch) fetch "$(realpath -m "${1:-build/te}")" ;;
split) split_files "$(realpath -m "${1:?te.sh: split DIR}")" ;;
store) keep "$(realpath -m "${1:?te.sh: store DIR}")" ;;
build) build ;;
run) run_parts "$@" ;;
all)
    build
    run_parts "$@"
    ;;
*) fail "no verb $verb; there are fetch, split, store, build, run" ;;
esac
