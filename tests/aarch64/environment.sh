#!/usr/bin/env bash
# environment.sh FOLDER REQUIREMENT...   makes FOLDER an environment of an AArch64 Python in qemu, with these packages
#
# Python and the libraries beneath it are Debian's packages, laid out in FOLDER/system; nothing is installed into this
# machine. FOLDER/bin/python starts qemu, and pip in it chooses as it does on such a processor. This machine's programs
# run as ever when Python starts them: a cross compiler does so at full speed.
set -euo pipefail
folder=$(realpath -m "$1")
shift
system=$folder/system

needs() {
    echo "grl_ext: the AArch64 build needs $1" >&2
    exit 1
}
for tool in apt-get dpkg; do
    command -v $tool >/dev/null || needs "$tool: its Python is made of Debian's packages"
done
command -v aarch64-linux-gnu-g++ >/dev/null || needs "a compiler: apt-get install g++-aarch64-linux-gnu"
qemu=$(command -v qemu-aarch64 || command -v qemu-aarch64-static) || needs "an emulator: apt-get install qemu-user"

rm -rf "$folder"
mkdir -p "$folder"/{bin,apt/lists/partial,apt/archives/partial} "$system"
touch "$folder/apt/status"

# As apt on an AArch64 machine where nothing is installed: it fetches all that the packages depend on.
apt() {
    apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Install-Recommends=false \
        -o Dir::State="$folder/apt" -o Dir::State::status="$folder/apt/status" -o Dir::Cache="$folder/apt" "$@"
}
apt update
apt --download-only --yes install python3-minimal libpython3-dev python3-pip-whl libstdc++6 libgomp1 >/dev/null ||
    needs "a package source with arm64, which those of this machine are not"
for package in "$folder"/apt/archives/*.deb; do
    dpkg-deb --extract "$package" "$system"
done
rm -r "$folder/apt"

version=$(basename "$(readlink "$system/usr/bin/python3")")
# Python's headers are at FOLDER/include, which comes before /usr/include, where this machine may have its own. One of
# them includes the one for the processor by its path from there.
ln -s system/usr/include/"$version" "$folder/include"
ln -s ../aarch64-linux-gnu "$folder/include/aarch64-linux-gnu"

# in_qemu FILE PROGRAM   makes FILE a command that runs the program. A Neoverse N1 has no SVE, as most have not;
# QEMU_CPU=max has it. Most of an import in qemu is to compile Python, which is to be kept.
in_qemu() {
    cat >"$1" <<END
#!/bin/sh
unset PYTHONDONTWRITEBYTECODE
export PATH="$folder/bin:\$PATH"
export QEMU_CPU="\${QEMU_CPU:-neoverse-n1}"
exec '$qemu' -L '$system' -0 "\$0" '$2' "\$@"
END
    chmod +x "$1"
}
in_qemu "$folder/bin/python" "$system/usr/bin/$version"
packages=$folder/lib/$version/site-packages
mkdir -p "$packages"
echo "home = $system/usr/bin" >"$folder/pyvenv.cfg"
PYTHONPATH=$(echo "$system"/usr/share/python-wheels/pip-*.whl) \
    "$folder/bin/python" -m pip install --quiet --no-compile pip "$@"

# What Python starts: ninja, and PyTorch's server of memory that processes share.
for program in "$folder/bin/ninja" "$packages/torch/bin/torch_shm_manager"; do
    mv "$program" "$program.aarch64"
    in_qemu "$program" "$program.aarch64"
done
