#!/bin/sh
# Meta-World is drawn by OSMesa, a system library: install it where that is possible, else say how in one line.
python3 -c 'import ctypes; ctypes.CDLL("libOSMesa.so.8")' 2>/dev/null && exit 0
python3 -c 'import ctypes; ctypes.CDLL("libOSMesa.so")' 2>/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get install -y -qq libosmesa6 || { apt-get update -qq && apt-get install -y -qq libosmesa6; }; } >/dev/null 2>&1 && exit 0
fi
echo "missing system library OSMesa: run 'sudo apt-get install libosmesa6' and repeat the command" >&2
exit 1
