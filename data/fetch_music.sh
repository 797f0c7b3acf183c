#!/usr/bin/env bash
# Real, free music from Debian's packages, unpacked into a folder: data/fetch_music.sh DIR [more]. Nothing is installed.
set -euo pipefail
dir=${1:?usage: fetch_music.sh DIR [more]}
case ${2:-} in
    '') packages=(nexuiz-music wesnoth-1.16-music) ;;
    more) # none of these shares a song with another
        packages=(amoebax-data fillets-ng-data flare-game freedroidrpg-data hedgewars-data marsshooter-data naev-data
            planetblupi-music-ogg plee-the-bear-data singularity-music ufoai-music widelands-data wizznic-data) ;;
    *)
        echo "error: $2: no such choice of music; say 'more' or leave it out" >&2
        exit 2 ;;
esac
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
lacking=() # a second call does nothing
for package in "${packages[@]}"; do
    [ -n "$(find -L "$dir/$package" -name '*.ogg' -print -quit 2>/dev/null)" ] || lacking+=("$package")
done
for package in "${lacking[@]}"; do
    for tool in apt-get dpkg-deb; do
        command -v "$tool" >/dev/null && continue
        echo "error: $tool is missing; download these Debian packages by hand and unpack the .ogg files of each" \
            "into a folder of its name in $dir: ${lacking[*]}" >&2
        exit 2
    done
    cd "$work"
    apt-get download -qq "$package" 2>/dev/null || { apt-get update -qq && apt-get download -qq "$package"; } || {
        echo "error: apt-get cannot download $package; download and unpack it by hand into $dir/$package" >&2
        exit 2
    }
    dpkg-deb -x "$package"_*.deb "$package"
    find "$package" -name '*.pk3' -exec python3 -m zipfile -e {} "$package/unzipped" \;
    rm -rf "$dir/$package.part"
    mkdir "$dir/$package.part"
    # thunder.ogg has 11 kHz, silence.ogg is no music, nor is speech in English
    find "$package" \( -ipath '*/music/*.ogg' -o -path '*/cdtracks/*.ogg' \) ! -name thunder.ogg ! -name silence.ogg \
        ! -path '*/en/*' -exec mv {} "$dir/$package.part" \;
    cp "$package"/usr/share/doc/*/copyright "$dir/$package.part/COPYRIGHT"
    mv -T "$dir/$package.part" "$dir/$package"
done
echo "$(find -L "$dir" -name '*.ogg' | wc -l) tracks in $dir"
