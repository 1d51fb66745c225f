#!/bin/sh
# Screenshots and the tests of MLflow's pages need a browser: install Debian's where that is possible, else say how.
# Nothing else needs one, so its lack is no failure.
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get install -y -qq chromium || { apt-get update -qq && apt-get install -y -qq chromium; }; } >/dev/null 2>&1 && exit 0
fi
echo "no browser, its tests are skipped: run 'sudo apt-get install chromium' to have them" >&2
exit 0
