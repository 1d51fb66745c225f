#!/bin/sh
# Prints a path of the project without a space: Ray's workers cannot start from one with a space (ray 2.60 puts their
# command through a shell unquoted), so such a project is reached through a link.
root=$(cd "$(dirname "$0")/../.." && pwd -P) || exit 1
case $root in
*[[:space:]]*)
    link=${TMPDIR:-/tmp}/smolvla-$(id -u)-$(printf %s "$root" | cksum | cut -d ' ' -f 1)-root
    [ "$(readlink "$link" 2>/dev/null)" = "$root" ] || ln -sfn "$root" "$link" || exit 1
    printf '%s\n' "$link"
    ;;
*) printf '%s\n' "$root" ;;
esac
