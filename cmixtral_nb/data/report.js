// Tables sort by the column whose title is pressed; a link to a manifest opens it
document.querySelectorAll('table.sort').forEach(t => t.querySelectorAll('thead th').forEach((th, i) => th.firstChild.addEventListener('click', () => {
  const up = th.getAttribute('aria-sort') !== 'ascending', body = t.tBodies[0];
  const key = r => { const c = r.cells[i], v = c.dataset.v ?? c.textContent.replace(/[,%×]/g, ''); return v !== '' && !isNaN(v) ? Number(v) : c.textContent; };
  const rows = [...body.rows].map(r => [key(r), r]);
  rows.sort(([a], [b]) => (typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b))) * (up ? 1 : -1));
  t.querySelectorAll('th').forEach(x => x.removeAttribute('aria-sort')); th.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  rows.forEach(([, r]) => body.append(r));
})));
const show = () => { const d = document.getElementById(decodeURIComponent(location.hash.slice(1))); if (d && d.tagName === 'DETAILS') { d.open = true; d.scrollIntoView(); } };
addEventListener('hashchange', show); show();
